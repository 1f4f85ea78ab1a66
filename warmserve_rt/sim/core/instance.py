"""Simulate an instance: a group of devices that serves one model, prefills first, and decodes all
requests in one batch.

The model of decoding is fluid: with n requests in the batch, each gains one token every
``profile.decode(n)`` seconds, and no token while a prefill runs. One number therefore tells when
each request is done: the tokens of a request that had been in the batch from the beginning.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np

from warmserve_rt.policy.profile import ModelProfile

from .events import Due

if TYPE_CHECKING:
    from .devices import Device
    from .fleet import Fleet


class Instance(Due):
    """An instance of a model. It loads from ``start`` on, and then serves.

    ``loaded``: whether it takes requests. ``running``: whether it works on them. ``draining``:
    whether it refuses new ones. ``ended``: whether it was stopped. ``streaming``: whether prefill
    runs while layers arrive, and not after them. ``kv_tokens``: prompt and output tokens of its
    requests. ``kv_room``: bytes of the KV cache on each device. ``working``: whether it computes.
    ``slow``: the factor by which its prefills and steps are slower than alone; the device with most
    working neighbours decides.
    """

    __slots__ = (
        "arrivals",
        "decoding",
        "devices",
        "draining",
        "ended",
        "fleet",
        "idle_since",
        "kv_room",
        "kv_tokens",
        "loaded",
        "missing",
        "model",
        "prefill_end",
        "prefilling",
        "profile",
        "progress",
        "queue",
        "queued_prefill",
        "running",
        "since",
        "slow",
        "start",
        "step",
        "streamed",
        "streaming",
        "work",
        "working",
    )

    def __init__(
        self,
        fleet: Fleet,
        model: int,
        profile: ModelProfile,
        devices: tuple[Device, ...],
        streaming: bool,
    ) -> None:
        super().__init__()
        self.fleet, self.model, self.profile, self.devices = fleet, model, profile, devices
        self.streaming = streaming
        self.slow, self.working = 1.0, False
        self.start = self.since = self.idle_since = fleet.events.now
        self.loaded = self.running = self.draining = self.ended = False
        self.missing: set[int] = set()  # devices on which layers are missing
        self.arrivals: list[float] = []  # when each layer was resident on all devices
        self.queue: deque[int] = deque()
        self.queued_prefill = 0.0  # seconds of work
        self.prefilling = -1
        self.prefill_end = 0.0
        self.streamed: deque[float] = deque()  # ends of the prefills that ran behind the layers
        self.decoding: list[tuple[float, int]] = []
        self.progress = 0.0
        self.step = profile.decode(0)
        self.kv_tokens = 0
        self.kv_room = 0.0  # bytes on each device
        self.work = 0  # the number of its requests

    def take(self, request: int) -> None:
        """Take a request to serve."""
        fleet = self.fleet
        now = fleet.events.now
        self.work += 1
        self.kv_tokens += fleet.tokens[request]
        self.queue.append(request)
        self.queued_prefill += self.profile.prefill(fleet.prompt[request])
        if self.running and self.prefilling < 0:
            self._settle(now)
            self._next(now)

    def backlog(self, now: float) -> float:
        """Return the seconds until a request that arrives now could begin its prefill."""
        running = max(0.0, self.prefill_end - now) if self.prefilling >= 0 else 0.0
        return running + self.queued_prefill * self.slow

    @property
    def active(self) -> bool:
        """Return whether it loads or has requests."""
        return self.work > 0 or not self.loaded

    def disturbed(self) -> None:
        """Adapt its speed after the instances beside it, or their work, have changed."""
        slow = self.fleet.slowdown(self)
        if slow != self.slow:
            self._pace(slow)

    def _pace(self, slow: float) -> None:
        """Set the slowdown, and reschedule the work in progress."""
        now = self.fleet.events.now
        self._settle(now)
        change, self.slow = slow / self.slow, slow
        self.step = self.profile.decode(len(self.decoding)) * slow
        self.streamed = deque(now + (end - now) * change for end in self.streamed)
        if self.prefilling >= 0:
            self.prefill_end = now + (self.prefill_end - now) * change
            self.fleet.events.schedule(self, self.prefill_end)
        elif self.decoding:
            wait = (self.decoding[0][0] - self.progress) * self.step
            self.fleet.events.schedule(self, now + wait)

    def ready(self) -> None:
        """Begin to work: all layers are resident, and waiting requests have been assigned."""
        if self.ended:
            return
        now = self.fleet.events.now
        self.running = True
        self.since = now
        if self.streaming:
            self._stream()
        if not self.queue:
            self.fleet.idle(self)
        elif self.prefilling < 0:
            self._next(now)

    def _stream(self) -> None:
        """Compute when the prefills that ran while layers arrived are done.

        A layer of a request can be computed once the layer and the request have arrived, earlier
        requests first. A machine that never waits while it has work ends at the maximum, over the
        arrival times u of layers and requests, of u plus the work that could not begin before u.
        For one request this is policy.pipeline.first_token.
        """
        fleet, profile, come = self.fleet, self.profile, np.array(self.arrivals)
        times = [max(fleet.time[request], self.arrivals[0]) for request in self.queue]
        points = np.concatenate((come, times))
        rest = np.append(np.cumsum(profile.compute(1.0)[::-1])[::-1], 0.0)
        late = rest[np.searchsorted(come, points)]  # the share of a forward pass from then on
        work = np.zeros(len(points))
        for request, time in zip(self.queue, times, strict=True):
            seconds = profile.prefill(fleet.prompt[request]) * self.slow
            work += seconds * np.where(points <= time, 1.0, late)
            end = np.max(points + work, initial=self.arrivals[-1], where=work > 0)
            self.streamed.append(float(end))

    def _settle(self, now: float) -> None:
        if self.prefilling < 0 and self.decoding:
            self.progress += (now - self.since) / self.step
        self.since = now

    def happen(self) -> None:
        fleet = self.fleet
        now = fleet.events.now
        self._settle(now)
        if self.prefilling >= 0:
            request, self.prefilling = self.prefilling, -1
            fleet.first_token[request] = now
            left = fleet.output[request] - 1
            if left > 0:
                heappush(self.decoding, (self.progress + left, request))
                self.step = self.profile.decode(len(self.decoding)) * self.slow
            else:
                self._finish(request, now)
            fleet.controller.prefilled(self)
        else:
            decoding, reached = self.decoding, self.progress + 1e-6
            while decoding and decoding[0][0] <= reached:
                self._finish(heappop(decoding)[1], now)
            self.step = self.profile.decode(len(decoding)) * self.slow
        # The controller may have assigned a request or stopped this instance in a callback.
        if self.prefilling < 0 and not self.ended:
            self._next(now)

    def _finish(self, request: int, now: float) -> None:
        fleet = self.fleet
        fleet.finished[request] = now
        self.work -= 1
        self.kv_tokens -= fleet.tokens[request]
        fleet.released(self)
        fleet.controller.finished(self, request)

    def _next(self, now: float) -> None:
        if self.queue:
            request = self.queue.popleft()
            seconds = self.profile.prefill(self.fleet.prompt[request])
            self.queued_prefill -= seconds
            end = self.streamed.popleft() if self.streamed else now + seconds * self.slow
            self.prefilling, self.prefill_end = request, end
            self.fleet.events.schedule(self, end)
        elif self.decoding:
            wait = (self.decoding[0][0] - self.progress) * self.step
            self.fleet.events.schedule(self, now + wait)
        else:
            self.fleet.events.cancel(self)
        working = self.prefilling >= 0 or bool(self.decoding)
        if working != self.working:
            self.working = working
            self.fleet.disturb(self)
        if not working:
            self.idle_since = now
            self.fleet.idle(self)
