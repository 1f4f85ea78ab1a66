"""An instance: a group of devices that serves one model, prefills first, decodes in one batch.

Decoding is fluid: with n requests in the batch every one of them gains a token each
``profile.decode(n)`` seconds, and none while a prefill runs. So one number, the tokens that a
request in the batch since the beginning would have, says when each is done.
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
    """Loads from its ``start`` on, then serves. ``loaded``: it takes requests; ``running``: it
    works on them; ``draining``: it takes no more; ``ended``: it is no more.

    ``streaming``: prefill runs behind the layers as they come in, not after them.
    ``kv_tokens``: of the requests it has, prompt and output; ``kv_room``: bytes on each device.
    ``working``: it computes; ``slow``: for those that work beside it on the one of its devices
    where the most do, its prefills and steps take so many times as long as alone.
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
        self.missing: set[int] = set()  # devices whose layers are not all there
        self.arrivals: list[float] = []  # when each layer was there on every device
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
        self.work = 0  # requests it has

    def take(self, request: int) -> None:
        """A request is its to serve."""
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
        """Seconds until a request that came now could begin its prefill, once it is loaded."""
        running = max(0.0, self.prefill_end - now) if self.prefilling >= 0 else 0.0
        return running + self.queued_prefill * self.slow

    @property
    def active(self) -> bool:
        """It loads or has requests."""
        return self.work > 0 or not self.loaded

    def disturbed(self) -> None:
        """Who works beside it has changed, or who is there."""
        slow = self.fleet.slowdown(self)
        if slow != self.slow:
            self._pace(slow)

    def _pace(self, slow: float) -> None:
        """What it is at takes that much longer, or less."""
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
        """Every layer is there; it has been given the requests that waited for it, or was ended."""
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
        """When the prefills that ran while layers came in are done.

        A layer of a request can be computed from when both are there, earlier requests first. One
        machine that never waits while it has work ends at the maximum, over the times u at which
        something came, of u and the work that could not begin before u. Of one request this is
        policy.pipeline.first_token.
        """
        fleet, profile, come = self.fleet, self.profile, np.array(self.arrivals)
        times = [max(fleet.time[request], self.arrivals[0]) for request in self.queue]
        points = np.concatenate((come, times))
        rest = np.append(np.cumsum(profile.compute(1.0)[::-1])[::-1], 0.0)
        late = rest[np.searchsorted(come, points)]  # of a forward pass, what comes from then on
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
        # Whoever heard of a finished request may have given a new one, or ended this instance.
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
