"""Runtimes under a scheduler: its plans become tickets and keep values, and it hears of requests.

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

from .device import RuntimeDevice, RuntimeShard, Stamps, find_model
from .loop import Loop
from .scheduler import Scheduler

LOG = logging.getLogger("warmserve_rt")
ERRORS = 100  # that are remembered
SERVICE_S = 1.0  # of a request of the first model, if the caller does not say


class RuntimeFleet:
    """One device for each runtime, in nodes of ``node_devices`` (by default all in one).

    A model is known by its bare name, as traffic knows it: "chat" for "chat@2" too. Each plan uses
    the revision that the bare name stands for at that time, so the fleet follows
    :meth:`Runtime.promote`, and a model that is unregistered and registered again. A name that
    stands for nothing, or for a model with other layers than the profile, is told once and skipped.

    A model is registered on every runtime, one that is w devices wide with the shard of rank r on
    runtimes whose place is r modulo w; it may be missing on devices of no complete group of w.
    ``bandwidth``: bytes a second that come to one device. ``switch_s``: seconds from a request to
    its lease when all is resident. ``exclusive``: a leased model has its device for itself;
    otherwise any model can be leased at any time. ``clock``: seconds.

    :meth:`arrived`, :meth:`finished`, :meth:`add` and :meth:`remove` may be called by any thread
    and wait for no plan; the scheduler runs where :meth:`poll` is called, or in the thread of
    :meth:`start`. ``errors``: the latest that loading or the scheduler met; they are logged too,
    and stop nothing.

    Raises ValueError for no runtimes or no models, one model twice, a model that is not registered
    or has other layers than its profile, or is wider than a node.
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
            raise ValueError("a fleet has runtimes, and models")
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"a bandwidth of {bandwidth} bytes a second")
        self.bandwidth, self.switch_s = bandwidth, switch_s
        self.node_devices = node_devices or len(runtimes)
        self.errors: deque[Exception] = deque(maxlen=ERRORS)
        self.devices = [
            RuntimeDevice(index, each, exclusive=exclusive, clock=clock, failed=self._failed)
            for index, each in enumerate(runtimes)
        ]
        self._loop = Loop(clock, self._call_failed)
        self._call_error = ""  # of the last call of the loop that failed
        self._scheduler: Scheduler | None = None
        self._events = threading.Lock()  # over the next four and the order of events
        self._models: dict[str, ModelProfile] = {}  # by bare name
        self._service: dict[str, float] = {}
        self._concurrent: dict[str, int] = {}  # also of models that were removed
        self._changed = True  # since the scheduler's models were arranged
        # As the scheduler sees them, which runs in one thread at a time.
        self._plans = threading.RLock()
        self.profiles: Sequence[ModelProfile] = ()
        self._rows: dict[str, int] = {}
        for profile in profiles:
            if bare_name(profile.name) in self._models:
                raise ValueError(
                    f"two profiles have one name, {bare_name(profile.name)}: revisions of a model "
                    "share a profile"
                )
            self._models[bare_name(profile.name)] = self._checked(profile)
        self._arrange()

    def __enter__(self) -> RuntimeFleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What an engine does.

    def begin(
        self,
        scheduler: Scheduler,
        forecaster: Forecaster,
        service: Sequence[float] | Mapping[str, float],
    ) -> None:
        """Makes the scheduler's first plan at once, and others whenever it is polled.

        ``service``: seconds of a request of each model, by name or in the order of the models.
        ``forecaster``: of as many models, or of names; names that it does not know begin without a
        past, and those that the fleet does not have are forgotten. Raises ValueError if there is a
        scheduler already, or for other models."""
        with self._plans:
            if self._scheduler:
                raise ValueError("the fleet has a scheduler")
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
        """Schedules one more model, from its profile, or from the model and the arguments of
        :func:`profile_of`. ``service``: seconds of one of its requests, by default the mean of the
        other models'. Forecasts of the others go on.

        Raises ValueError for a model that the fleet has or that is not registered, and as the
        constructor does; TypeError as :func:`profile_of` does."""
        if isinstance(profile, Model):
            profile = profile_of(profile, **times)
        elif times:
            raise TypeError(f"a profile has its own {', '.join(times)}: give either")
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
        """Schedules a model no more: its loads are cancelled and its layers are the first to be
        evicted. It stays registered, and requests that have arrived may still finish. Raises
        ValueError for a model that the fleet does not have."""
        with self._events:
            name = self._known(model)
            del self._models[name]
            self._service.pop(name, None)
            self._change()

    def arrived(self, model: str, prompt_tokens: int) -> None:
        """Tells of a request that has come. Raises ValueError for a model that has no profile."""
        with self._events:
            name = self._known(model)
            count = self._concurrent[name] = self._concurrent.get(name, 0) + 1
            now = self.now
            self._loop.post(lambda: self._arrived(name, now, count, prompt_tokens))

    def finished(self, model: str) -> None:
        """Tells of a request that has ended. Raises ValueError if none of that model is left."""
        with self._events:
            name = bare_name(model)
            count = self._concurrent.get(name, 0)
            if not count:
                self._known(model)
                raise ValueError(f"{name!r} has no request that could end")
            count -= 1
            self._concurrent[name] = count
            if not count:
                del self._concurrent[name]
            now = self.now
            self._loop.post(lambda: self._finished(name, now, count))

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models that the fleet has now."""
        with self._events:
            return tuple(self._models)

    def poll(self) -> float | None:
        """Does what is due; returns seconds until there is more, None where nothing is to come."""
        return self._loop.poll()

    def start(self) -> None:
        """A daemon thread does what is due, until :meth:`close`; the clock is to be a real one."""
        self._loop.start()

    def close(self) -> None:
        """Ends the thread and calls off what it was loading; the runtimes stay open. Idempotent."""
        self._loop.close()
        for device in self.devices:
            device.call_all_off()

    # What a scheduler sees and does.

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

    def stamp(
        self, device: RuntimeDevice, shard: RuntimeShard, layers: int, stamps: Stamps
    ) -> None:
        device.stamp(shard.model, layers, stamps)

    def load(
        self, device: RuntimeDevice, model: int, rank: int, layers: int, stamps: Stamps
    ) -> bool:
        return device.load(model, layers, stamps)

    def call_off(self, device: RuntimeDevice, shard: RuntimeShard, layers: int) -> None:
        device.call_off(shard, layers)

    def _arrived(self, name: str, at: float, concurrent: int, prompt: int) -> None:
        with self._plans:
            self._arrange()
            if self._scheduler and name in self._rows:
                self._scheduler.demand.arrived(self._rows[name], at, concurrent, prompt)
                self._scheduler.changed()

    def _finished(self, name: str, at: float, concurrent: int) -> None:
        with self._plans:
            self._arrange()
            if self._scheduler and name in self._rows:
                self._scheduler.demand.finished(self._rows[name], at, concurrent)
                self._scheduler.changed()

    def _known(self, model: str) -> str:
        name = bare_name(model)
        if name not in self._models:
            there = ", ".join(self._models) or "none"
            raise ValueError(f"{name!r} has no profile: there are {there}")
        return name

    def _change(self) -> None:
        """Has the models arranged before the next event."""
        self._changed = True
        self._loop.post(self._arrange_in_turn)

    def _arrange_in_turn(self) -> None:
        with self._plans:
            self._arrange()

    def _arrange(self) -> None:
        """Brings the scheduler and the devices to the models of now."""
        with self._events:
            if not self._changed:
                return
            self._changed = False
            profiles = tuple(self._models.values())
            services = [self._service.get(profile.name, SERVICE_S) for profile in profiles]
        # A profile that was removed and added again is another model.
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
        """The loop repeats a call that failed: the same failure is told once."""
        told = f"{type(error).__name__}: {error}"
        if told != self._call_error:
            self._call_error = told
            self._failed(error)

    def _rank(self, index: int, profile: ModelProfile) -> int | None:
        """The rank of the shard on the device of that index, None if no group of it lies there."""
        first = index - index % profile.width
        last = first + profile.width - 1
        if last >= len(self.devices) or first // self.node_devices != last // self.node_devices:
            return None
        return index % profile.width

    def _checked(self, profile: ModelProfile) -> ModelProfile:
        """The profile under its bare name. Raises ValueError unless the model is registered where
        it should be."""
        if profile.width > min(self.node_devices, len(self.devices)):
            raise ValueError(f"{profile.name} wants {profile.width} devices of one node")
        found = replace(profile, name=bare_name(profile.name))
        for device in self.devices:
            if self._rank(device.index, found) is not None:
                find_model(device.runtime, device.index, found)
        return found


def bare_name(model: str) -> str:
    """The name without a revision. Raises ValueError for one that is no name of a model."""
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
    """The profile of a registered model, or of one shard of ``width``, whose layers take whole
    granules. See ModelProfile for the other arguments and what is raised."""
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
