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
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from warmserve_rt.core.model import Model
from warmserve_rt.core.revisions import parse_name
from warmserve_rt.core.runtime import Runtime
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.profile import ModelProfile

from .device import RuntimeDevice, find_model
from .loop import Loop
from .scheduler import Scheduler

LOG = logging.getLogger("warmserve_rt")
ERRORS = 100  # the number of errors that are remembered
SERVICE_S = 1.0  # seconds of a request of the first model, if the caller gives none


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
        Bytes per second that one device can load.
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
        If there are no runtimes or no models, if a model is given twice, is not registered or is
        wider than a node, or if its number of layers differs from its profile's.

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
        self.bandwidth, self.switch_s = bandwidth, switch_s
        self.node_devices = node_devices or len(runtimes)
        self.errors: deque[Exception] = deque(maxlen=ERRORS)
        self.devices = [
            RuntimeDevice(index, each, exclusive=exclusive, clock=clock, failed=self._failed)
            for index, each in enumerate(runtimes)
        ]
        self._loop = Loop(clock, self._call_failed)
        self._call_error = ""  # the error of the loop's last failed call
        self._scheduler: Scheduler | None = None
        self._events = threading.Lock()  # guards the next four and the order of events
        self._models: dict[str, ModelProfile] = {}  # by bare name
        self._service: dict[str, float] = {}
        self._concurrent: dict[str, int] = {}  # includes models that were removed
        self._changed = True  # whether the models changed since the last _arrange
        # Held while the scheduler runs. Guards the next two, which are the scheduler's view.
        self._plans = threading.RLock()
        self.profiles: Sequence[ModelProfile] = ()
        self._rows: dict[str, int] = {}
        for profile in profiles:
            if bare_name(profile.name) in self._models:
                raise ValueError(
                    f"two profiles have one name, {bare_name(profile.name)}: give one profile "
                    "for all revisions of a model"
                )
            self._models[bare_name(profile.name)] = self._checked(profile)
        self._arrange()

    def __enter__(self) -> RuntimeFleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Called by an engine.

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
        with self._plans:
            if self._scheduler:
                raise ValueError("the fleet has a scheduler already")
            self._arrange()
            names = list(self._rows)
            if not isinstance(service, Mapping) and len(service) == len(names):
                service = dict(zip(names, service, strict=True))
            if not isinstance(service, Mapping) or not service.keys() >= set(names):
                given = ", ".join(service) if isinstance(service, Mapping) else len(service)
                raise ValueError(
                    f"service must have seconds for each of {', '.join(names)}, got {given}"
                )
            forecaster.arrange(names)
            services = [float(service[name]) for name in names]
            with self._events:
                self._service.update(zip(names, services, strict=True))
            scheduler.begin(self, forecaster, services)
            self._scheduler = scheduler

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
        checked = self._checked(profile)
        with self._events:
            if checked.name in self._models:
                raise ValueError(f"the fleet has {checked.name!r} already: remove it first")
            others = self._service.values()
            self._service[checked.name] = service or (fmean(others) if others else SERVICE_S)
            self._models[checked.name] = checked
            self._change()

    def remove(self, model: str) -> None:
        """Remove a model from the fleet: cancel its loads and let its layers be evicted first.

        The model stays registered, and requests that have arrived may still finish. Thread-safe;
        does not wait for a plan.

        Raises
        ------
        ValueError
            If the fleet does not have the model.
        """
        with self._events:
            name = self._known(model)
            del self._models[name]
            self._service.pop(name, None)
            self._change()

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
        with self._events:
            name = self._known(model)
            count = self._concurrent[name] = self._concurrent.get(name, 0) + 1
            now = self.now
            self._loop.post(lambda: self._arrived(name, now, count, prompt_tokens))

    def finished(self, model: str) -> None:
        """Record the end of a request. Thread-safe; does not wait for a plan.

        Raises
        ------
        ValueError
            If no request of that model is in progress.
        """
        with self._events:
            name = bare_name(model)
            count = self._concurrent.get(name, 0)
            if not count:
                self._known(model)
                raise ValueError(f"{name!r} has no request in progress that could end")
            count -= 1
            self._concurrent[name] = count
            if not count:
                del self._concurrent[name]
            now = self.now
            self._loop.post(lambda: self._finished(name, now, count))

    @property
    def models(self) -> tuple[str, ...]:
        """Return the bare names of the fleet's models."""
        with self._events:
            return tuple(self._models)

    def poll(self) -> float | None:
        """Make the calls that are due. Return the seconds until the next call, or None if no call
        is scheduled."""
        return self._loop.poll()

    def start(self) -> None:
        """Start a daemon thread that polls until :meth:`close`. Needs a clock of real time.

        Raises
        ------
        ValueError
            If the thread was started before, or the fleet is closed.
        """
        self._loop.start()

    def close(self) -> None:
        """Stop the thread and cancel the fleet's loads. The runtimes stay open. Idempotent."""
        self._loop.close()
        for device in self.devices:
            device.cancel_all()

    # Called by a scheduler.

    @property
    def now(self) -> float:
        return self._loop.clock()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        def look_and_call() -> None:
            with self._plans:
                self._arrange()
                for device in self.devices:
                    device.refresh()
                call()
                self._call_error = ""

        self._loop.after(seconds, look_and_call)

    def _arrived(self, name: str, at: float, concurrent: int, prompt: int) -> None:
        with self._plans:
            self._arrange()
            if self._scheduler and name in self._rows:
                self._scheduler.arrived(self._rows[name], at, concurrent, prompt)
                self._scheduler.changed()

    def _finished(self, name: str, at: float, concurrent: int) -> None:
        with self._plans:
            self._arrange()
            if self._scheduler and name in self._rows:
                self._scheduler.finished(self._rows[name], at, concurrent)
                self._scheduler.changed()

    def _known(self, model: str) -> str:
        name = bare_name(model)
        if name not in self._models:
            there = ", ".join(self._models) or "none"
            raise ValueError(f"{name!r} has no profile: the fleet has {there}")
        return name

    def _change(self) -> None:
        """Schedule :meth:`_arrange` before the next event."""
        self._changed = True
        self._loop.post(self._arrange_in_turn)

    def _arrange_in_turn(self) -> None:
        with self._plans:
            self._arrange()

    def _arrange(self) -> None:
        """Give the current models to the scheduler and the devices."""
        with self._events:
            if not self._changed:
                return
            self._changed = False
            profiles = tuple(self._models.values())
            services = [self._service.get(profile.name, SERVICE_S) for profile in profiles]
        # A model that was removed and added again begins anew: its profile is another object.
        before = {profile.name: row for row, profile in enumerate(self.profiles)}
        rows = [
            row if (row := before.get(p.name)) is not None and self.profiles[row] is p else None
            for p in profiles
        ]
        self.profiles = profiles
        self._rows = {profile.name: row for row, profile in enumerate(profiles)}
        for device in self.devices:
            device.arrange([(p, self._rank(device.index, p)) for p in profiles], rows)
        if self._scheduler:
            self._scheduler.arrange(profiles, services, rows)

    def _failed(self, error: Exception) -> None:
        self.errors.append(error)
        LOG.warning("%s: %s", type(error).__name__, error)

    def _call_failed(self, error: Exception) -> None:
        """Report an error of the loop once, although the loop repeats the call that failed."""
        told = f"{type(error).__name__}: {error}"
        if told != self._call_error:
            self._call_error = told
            self._failed(error)

    def _rank(self, index: int, profile: ModelProfile) -> int | None:
        """Return the rank of the shard that belongs on the device of this index, or None if no
        complete group of the model includes the device."""
        first = index - index % profile.width
        last = first + profile.width - 1
        if last >= len(self.devices) or first // self.node_devices != last // self.node_devices:
            return None
        return index % profile.width

    def _checked(self, profile: ModelProfile) -> ModelProfile:
        """Return the profile under its bare name. Raise ValueError unless the model is registered
        on every device that needs it."""
        if profile.width > min(self.node_devices, len(self.devices)):
            raise ValueError(f"{profile.name} needs {profile.width} devices of one node")
        found = replace(profile, name=bare_name(profile.name))
        for device in self.devices:
            if self._rank(device.index, found) is not None:
                find_model(device.runtime, device.index, found)
        return found


def bare_name(model: str) -> str:
    """Return the name without its revision. Raise ValueError if it is not a valid model name."""
    if not isinstance(model, str):
        raise ValueError(f"a model's name must be a string, got {model!r}")
    return parse_name(model)[0]


def profile_of(
    model: Model,
    *,
    prefill_s: float,
    prefill_token_s: float,
    decode_s: float,
    decode_request_s: float = 0.0,
    width: int = 1,
    batch: int = 1,
    kv_token_bytes: int = 0,
    ends: bool = True,
    granule: int = 2 << 20,
) -> ModelProfile:
    """Return the profile of a registered model.

    Parameters
    ----------
    model
        The registered model, or one of its ``width`` shards.
    granule
        Bytes of a granule. The bytes of each layer are rounded up to whole granules.
    prefill_s, prefill_token_s, decode_s, decode_request_s, width, batch, kv_token_bytes, ends
        See :class:`ModelProfile`, which also tells the errors.
    """
    return ModelProfile(
        name=model.name,
        width=width,
        layer_bytes=tuple(max(1, -(-layer.nbytes // granule)) * granule for layer in model.layers),
        kv_token_bytes=kv_token_bytes,
        prefill_s=prefill_s,
        prefill_token_s=prefill_token_s,
        decode_s=decode_s,
        decode_request_s=decode_request_s,
        batch=batch,
        ends=ends,
    )
