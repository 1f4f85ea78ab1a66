"""Runtimes under a scheduler: its plans become tickets and keep values, and it hears of requests.

with RuntimeFleet([runtime], [profile_of(model, ...)], bandwidth=20e9) as fleet:
    fleet.begin(Scheduler(), Forecaster(1), [seconds_of_a_request])
    fleet.start()
    ...
    fleet.arrived("chat", prompt_tokens)
    with runtime.lease("chat", streaming=True):
        ...
    fleet.finished("chat")
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .loop import Loop
from .model import Model
from .policy.forecast import Forecaster
from .policy.profile import ModelProfile
from .runtime import Runtime
from .runtime_device import RuntimeDevice, RuntimeShard, Stamps
from .scheduler import Scheduler

LOG = logging.getLogger("warmserve_rt")
ERRORS = 100  # that are remembered


class RuntimeFleet:
    """One device for each runtime, in nodes of ``node_devices`` (by default all in one).

    A model is registered under its profile's name on every runtime, one that is w devices wide with
    the shard of rank r where the runtime's place is r modulo w; only where no group of w devices
    lies does it not have to be. ``bandwidth``: bytes a second that come to one device.
    ``switch_s``: seconds from a request to its lease when all is resident. ``exclusive``: a leased
    model has its device for itself; otherwise any model can be leased at any time. ``clock``:
    seconds.

    :meth:`arrived` and :meth:`finished` may be called by any thread; the scheduler runs where
    :meth:`poll` is called, or in the thread of :meth:`start`. ``errors``: the latest that loading
    or the scheduler met; they are logged too, and stop nothing.

    Raises ValueError for no runtimes, two profiles of one name, a model that is not registered or
    has other layers than its profile, or is wider than a node.
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
        self.profiles: Sequence[ModelProfile] = tuple(profiles)
        self.bandwidth, self.switch_s = bandwidth, switch_s
        self.node_devices = node_devices or len(runtimes)
        self.errors: deque[Exception] = deque(maxlen=ERRORS)
        self._numbers = {profile.name: i for i, profile in enumerate(profiles)}
        if len(self._numbers) < len(profiles):
            raise ValueError("two profiles have one name")
        self.devices = [
            RuntimeDevice(
                index,
                runtime,
                self.profiles,
                [self._registered(runtime, index, len(runtimes), each) for each in profiles],
                exclusive=exclusive,
                clock=clock,
                failed=self._failed,
            )
            for index, runtime in enumerate(runtimes)
        ]
        self._loop = Loop(clock, self._failed)
        self._scheduler: Scheduler | None = None
        self._concurrent = [0] * len(profiles)
        self._events = threading.Lock()  # over _concurrent and the order of events

    def __enter__(self) -> RuntimeFleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What an engine does.

    def begin(self, scheduler: Scheduler, forecaster: Forecaster, service: Sequence[float]) -> None:
        """The scheduler makes its first plan, here and now, and others whenever it is polled.
        ``service``: seconds of each model's requests. Raises ValueError where there is a scheduler
        already."""
        if self._scheduler:
            raise ValueError("the fleet has a scheduler")
        scheduler.begin(self, forecaster, service)
        self._scheduler = scheduler

    def arrived(self, model: str, prompt_tokens: int) -> None:
        """A request has come. Raises ValueError for a model that has no profile."""
        number = self._number(model)
        with self._events:
            self._concurrent[number] += 1
            now, count = self.now, self._concurrent[number]
            self._loop.post(lambda: self._arrived(number, now, count, prompt_tokens))

    def finished(self, model: str) -> None:
        """A request has ended. Raises ValueError where none of that model is left."""
        number = self._number(model)
        with self._events:
            if not self._concurrent[number]:
                raise ValueError(f"{model!r} has no request that could end")
            self._concurrent[number] -= 1
            now, count = self.now, self._concurrent[number]
            self._loop.post(lambda: self._finished(number, now, count))

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
            for device in self.devices:
                device.refresh()
            call()

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

    def _arrived(self, model: int, at: float, concurrent: int, prompt: int) -> None:
        if self._scheduler:
            self._scheduler.demand.arrived(model, at, concurrent, prompt)
            self._scheduler.changed()

    def _finished(self, model: int, at: float, concurrent: int) -> None:
        if self._scheduler:
            self._scheduler.demand.finished(model, at, concurrent)
            self._scheduler.changed()

    def _number(self, model: str) -> int:
        if model not in self._numbers:
            raise ValueError(f"{model!r} has no profile: there are {', '.join(self._numbers)}")
        return self._numbers[model]

    def _failed(self, error: Exception) -> None:
        self.errors.append(error)
        LOG.warning("%s: %s", type(error).__name__, error)

    def _registered(
        self, runtime: Runtime, index: int, devices: int, profile: ModelProfile
    ) -> Model | None:
        """The model of a profile on the device of that index, None where no group of it lies."""
        if profile.width > min(self.node_devices, devices):
            raise ValueError(f"{profile.name} wants {profile.width} devices of one node")
        first = index - index % profile.width
        last = first + profile.width - 1
        if last >= devices or first // self.node_devices != last // self.node_devices:
            return None
        model = runtime.model(profile.name)
        if len(model.layers) != len(profile.layer_bytes):
            raise ValueError(
                f"{profile.name} has {len(model.layers)} layers on device {index}, and "
                f"{len(profile.layer_bytes)} in its profile"
            )
        return model


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
