"""Run a scheduler on runtimes: turn its plans into tickets and keep values, and report requests.

with RuntimeFleet([runtime], [profile_of(model, ...)], bandwidth=20e9) as fleet:
    fleet.begin(Scheduler(), Forecaster(1), [seconds_of_a_request])
    fleet.start()
    ...
    fleet.arrived("chat", prompt_tokens)
    with runtime.lease("chat", streaming=True):
        ...
    fleet.finished("chat")
    fleet.add(profile_of(runtime.register("code", path), ...))
    fleet.remove("chat")
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from warmserve_rt.core.model import Model
from warmserve_rt.core.runtime import Runtime
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.profile import ModelProfile

from .device import RuntimeDevice
from .fleet_models import FleetModels
from .registered_models import bare_name, profile_of
from .scheduled_runtimes import ScheduledRuntimes
from .scheduler import Scheduler

LOG = logging.getLogger("warmserve_rt")
ERRORS = 100  # the number of errors that are remembered
# The speed of loads from the page cache relative to loads from the host cache, if the caller gives
# none: about that of an H200 (docs/numbers.md). The choice of layers depends little on it.
FILE_SPEED = 0.5


class RuntimeFleet:
    """A fleet of runtimes, one for each device, under one scheduler.

    The fleet knows a model by its bare name, as the traffic does: "chat" also means "chat@2". Each
    plan uses the revision that the bare name stands for at that time. The fleet therefore follows
    :meth:`Runtime.promote`, and a model that is unregistered and registered again. If a name
    stands for no model, or for a model whose number of layers differs from the profile's, the
    fleet reports it once and skips the model.

    A model must be registered on every runtime. For a model that is w devices wide, the i-th
    runtime must hold the shard of rank i modulo w; the model may be omitted on devices that belong
    to no complete group of w.

    Parameters
    ----------
    runtimes
        One runtime for each device.
    profiles
        The profiles of the models.
    bandwidth
        Bytes per second that one device can load; if its runtime has a host cache, out of the
        cache.
    file_bandwidth
        Bytes per second that one device can load of layers that are not in its host cache; by
        default half of ``bandwidth``. Not used for runtimes without a host cache.
    switch_s
        Seconds from a request to its lease if all layers are resident.
    node_devices
        The number of devices of a node. By default all devices belong to one node.
    exclusive
        Whether a leased model has its device to itself. Otherwise any model can be leased at any
        time.
    clock
        Returns the time in seconds.

    Attributes
    ----------
    errors
        The latest errors of loads and of the scheduler, at most ``ERRORS``. They are also logged,
        and do not stop the fleet.

    Raises
    ------
    ValueError
        If a bandwidth is invalid, if there are no runtimes or no models, if a model is given twice,
        is not registered or is wider than a node, or if its number of layers differs from its
        profile's.

    Notes
    -----
    :meth:`arrived`, :meth:`finished`, :meth:`add` and :meth:`remove` are thread-safe and do not
    wait for a plan. The scheduler runs in the thread that calls :meth:`poll`, or in the thread of
    :meth:`start`.
    """

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        profiles: Sequence[ModelProfile],
        *,
        bandwidth: float,
        file_bandwidth: float | None = None,
        switch_s: float = 0.001,
        node_devices: int | None = None,
        exclusive: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not runtimes or not profiles:
            raise ValueError("a fleet must have runtimes and models, at least one of each")
        if not 0 < bandwidth < math.inf:
            raise ValueError(
                f"bandwidth must be positive and finite bytes per second, got {bandwidth}"
            )
        if file_bandwidth is None:
            file_bandwidth = bandwidth * FILE_SPEED
        if not 0 < file_bandwidth <= bandwidth:
            raise ValueError(
                f"file_bandwidth must be positive and at most bandwidth = {bandwidth} bytes per "
                f"second, got {file_bandwidth}"
            )
        self.errors: deque[Exception] = deque(maxlen=ERRORS)
        self.devices = [
            RuntimeDevice(index, each, exclusive=exclusive, clock=clock, failed=self._failed)
            for index, each in enumerate(runtimes)
        ]
        self._models = FleetModels()
        self._scheduled = ScheduledRuntimes(
            self.devices,
            self._models,
            bandwidth=bandwidth,
            file_bandwidth=file_bandwidth,
            switch_s=switch_s,
            node_devices=node_devices or len(runtimes),
            clock=clock,
            failed=self._failed,
        )
        for profile in profiles:
            name = bare_name(profile.name)
            if name in self._models.profiles:
                raise ValueError(
                    f"two profiles have one name, {name}: give one profile for all revisions of a "
                    "model"
                )
            self._models.profiles[name] = self._scheduled.checked(profile)
        self._scheduled.arrange()

    def __enter__(self) -> RuntimeFleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(
        self,
        scheduler: Scheduler,
        forecaster: Forecaster,
        service: Sequence[float] | Mapping[str, float],
    ) -> None:
        """Start a scheduler: make its first plan now, and later plans when the fleet is polled.

        Parameters
        ----------
        scheduler
            The scheduler to start.
        forecaster
            A forecaster of as many models as the fleet has, or of named models. Models that it
            does not know begin without a history, and it forgets models that are not in the
            fleet.
        service
            Seconds that a request of each model takes, by name or in the order of the models.

        Raises
        ------
        ValueError
            If the fleet has a scheduler, or if ``forecaster`` or ``service`` are for other models.
        """
        self._scheduled.begin(scheduler, forecaster, service)

    def add(
        self, profile: ModelProfile | Model, *, service: float | None = None, **times: Any
    ) -> None:
        """Add a model to the fleet. The forecasts of the other models continue.

        Parameters
        ----------
        profile
            The profile of the model, or the model itself.
        service
            Seconds that one of its requests takes; by default the mean of the other models.
        times
            The arguments of :func:`profile_of`, if ``profile`` is a model.

        Raises
        ------
        ValueError
            If the fleet has the model already, if the model is not registered or is wider than a
            node, if its number of layers differs from the profile's, or if ``service`` is not
            positive and finite.
        TypeError
            If ``times`` are given with a profile, or are not the arguments of :func:`profile_of`.

        Notes
        -----
        Thread-safe; does not wait for a plan.
        """
        if isinstance(profile, Model):
            profile = profile_of(profile, **times)
        elif times:
            raise TypeError(f"give either a profile or {', '.join(times)}: a profile has its own")
        if service is not None and not 0 < service < math.inf:
            raise ValueError(f"service must be positive and finite seconds, got {service}")
        checked = self._scheduled.checked(profile)
        with self._models.lock:
            self._models.add(checked, service)
            self._scheduled.changed()

    def remove(self, model: str) -> None:
        """Remove a model from the fleet: cancel its loads and let its layers be evicted first.

        The model stays registered, and requests that have arrived may still finish. Thread-safe;
        does not wait for a plan.

        Raises
        ------
        ValueError
            If the fleet does not have the model.
        """
        with self._models.lock:
            self._models.remove(model)
            self._scheduled.changed()

    def arrived(self, model: str, prompt_tokens: int) -> None:
        """Record the arrival of a request. Thread-safe; does not wait for a plan.

        Parameters
        ----------
        model
            The name of the model.
        prompt_tokens
            The number of tokens of the request's prompt.

        Raises
        ------
        ValueError
            If the model has no profile.
        """
        with self._models.lock:
            name, concurrent = self._models.arrived(model)
            self._scheduled.arrived(name, concurrent, prompt_tokens)

    def finished(self, model: str) -> None:
        """Record the end of a request. Thread-safe; does not wait for a plan.

        Raises
        ------
        ValueError
            If no request of that model is in progress.
        """
        with self._models.lock:
            name, concurrent = self._models.finished(model)
            self._scheduled.finished(name, concurrent)

    @property
    def models(self) -> tuple[str, ...]:
        """Return the bare names of the fleet's models."""
        with self._models.lock:
            return tuple(self._models.profiles)

    def poll(self) -> float | None:
        """Make the calls that are due. Return the seconds until the next call, or None if no call
        is scheduled."""
        return self._scheduled.loop.poll()

    def start(self) -> None:
        """Start a daemon thread that polls until :meth:`close`. Needs a clock of real time.

        Raises
        ------
        ValueError
            If the thread was started before, or the fleet is closed.
        """
        self._scheduled.loop.start()

    def close(self) -> None:
        """Stop the thread and cancel the fleet's loads. The runtimes stay open. Idempotent."""
        self._scheduled.loop.close()
        for device in self.devices:
            device.cancel_all()

    def _failed(self, error: Exception) -> None:
        self.errors.append(error)
        LOG.warning("%s: %s", type(error).__name__, error)
