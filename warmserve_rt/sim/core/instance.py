"""Simulate an instance: it serves one model, prefills first, and decodes all requests in one batch.

The model of decoding is fluid: with n requests in the batch, each gains one token every
``profile.decode(n)`` seconds, and no token while a prefill runs. One number therefore tells when
each request is done: the tokens of a request that had been in the batch from the beginning.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import Protocol

import numpy as np

from warmserve_rt.policy.profile import ModelProfile

from .clock import Clock, Event
from .requests import Requests


class Owner(Protocol):
    """The owner of instances, which learns of their progress. The callbacks may assign requests to
    the instance, and may stop it if it has none."""

    def on_first_token(self, instance: Instance, request: int) -> None:
        """Handle the end of a prefill, after on_finished if the request has no more tokens."""

    def on_finished(self, instance: Instance, request: int) -> None:
        """Handle the last token of a request."""

    def on_computing(self, instance: Instance) -> None:
        """Handle a change of ``computing``."""

    def on_idle(self, instance: Instance) -> None:
        """Handle that a loaded instance has no work."""


class Instance(Event):
    """An instance of a model. It loads from ``started_at`` on, and then serves.

    ``device_indices``: its devices, in the order of their ranks. ``loaded``: whether it takes
    requests. ``serving``: whether it works on them. ``draining``: whether it refuses new ones.
    ``ended``: whether it was stopped. ``streaming``: whether prefill runs while layers arrive, and
    not after them. ``request_count``: the number of its requests. ``kv_tokens``: their prompt and
    output tokens. ``kv_room``: bytes of the KV cache on each device. ``computing``: whether a
    prefill or a step runs. ``slowdown``: the factor by which its prefills and steps are slower than
    alone.

    Parameters
    ----------
    owner
        Learns of its progress.
    clock, requests
        The time and the requests of the run.
    model, profile
        The index and the profile of its model.
    device_indices
        Its devices, in the order of their ranks.
    streaming
        Whether prefill runs while layers arrive.
    """

    __slots__ = (
        "clock",
        "computing",
        "decoding",
        "device_indices",
        "draining",
        "ended",
        "idle_since",
        "kv_room",
        "kv_tokens",
        "layer_arrivals",
        "loaded",
        "missing_on",
        "model",
        "owner",
        "prefill_end",
        "prefilling",
        "profile",
        "progress",
        "queue",
        "queued_prefill_s",
        "request_count",
        "requests",
        "serving",
        "since",
        "slowdown",
        "started_at",
        "step_s",
        "streamed_ends",
        "streaming",
    )

    def __init__(
        self,
        owner: Owner,
        clock: Clock,
        requests: Requests,
        *,
        model: int,
        profile: ModelProfile,
        device_indices: tuple[int, ...],
        streaming: bool,
    ) -> None:
        super().__init__()
        self.owner, self.clock, self.requests = owner, clock, requests
        self.model, self.profile, self.device_indices = model, profile, device_indices
        self.streaming = streaming
        self.slowdown, self.computing = 1.0, False
        self.started_at = self.since = self.idle_since = clock.now
        self.loaded = self.serving = self.draining = self.ended = False
        self.missing_on: set[int] = set()  # devices on which layers are missing
        self.layer_arrivals: list[float] = []  # when each layer was resident on all devices
        self.queue: deque[int] = deque()
        self.queued_prefill_s = 0.0
        self.prefilling = -1  # the request, or -1
        self.prefill_end = 0.0
        self.streamed_ends: deque[float] = deque()  # of the prefills that ran behind the layers
        self.decoding: list[tuple[float, int]] = []  # a heap of (progress at its end, request)
        self.progress = 0.0
        self.step_s = profile.decode(0)
        self.kv_tokens = 0
        self.kv_room = 0.0
        self.request_count = 0

    def take(self, request: int) -> None:
        """Take a request to serve."""
        requests = self.requests
        self.request_count += 1
        self.kv_tokens += requests.tokens[request]
        self.queue.append(request)
        self.queued_prefill_s += self.profile.prefill(requests.prompt[request])
        if self.serving and self.prefilling < 0:
            now = self.clock.now
            self._accrue(now)
            self._schedule_next(now)

    def backlog(self, now: float) -> float:
        """Return the seconds until a request that arrives now could begin its prefill."""
        running = max(0.0, self.prefill_end - now) if self.prefilling >= 0 else 0.0
        return running + self.queued_prefill_s * self.slowdown

    @property
    def active(self) -> bool:
        """Return whether it loads or has requests."""
        return self.request_count > 0 or not self.loaded

    def set_slowdown(self, slowdown: float) -> None:
        """Set the slowdown, and reschedule the work in progress."""
        now = self.clock.now
        self._accrue(now)
        change, self.slowdown = slowdown / self.slowdown, slowdown
        self.step_s = self.profile.decode(len(self.decoding)) * slowdown
        self.streamed_ends = deque(now + (end - now) * change for end in self.streamed_ends)
        if self.prefilling >= 0:
            self.prefill_end = now + (self.prefill_end - now) * change
            self.clock.schedule(self, self.prefill_end)
        elif self.decoding:
            wait = (self.decoding[0][0] - self.progress) * self.step_s
            self.clock.schedule(self, now + wait)

    def begin_serving(self) -> None:
        """Begin to work: all layers are resident, and waiting requests have been assigned."""
        if self.ended:
            return
        now = self.clock.now
        self.serving = True
        self.since = now
        if self.streaming:
            self._stream()
        if not self.queue:
            self.owner.on_idle(self)
        elif self.prefilling < 0:
            self._schedule_next(now)

    def _stream(self) -> None:
        """Compute when the prefills that ran while layers arrived are done.

        A layer of a request can be computed once the layer and the request have arrived, earlier
        requests first. A machine that never waits while it has work ends at the maximum, over the
        arrival times u of layers and requests, of u plus the work that could not begin before u.
        For one request this is policy.pipeline.first_token.
        """
        requests, profile, layers = self.requests, self.profile, np.array(self.layer_arrivals)
        times = [max(requests.time[request], self.layer_arrivals[0]) for request in self.queue]
        points = np.concatenate((layers, times))
        rest = np.append(np.cumsum(profile.compute(1.0)[::-1])[::-1], 0.0)
        late = rest[np.searchsorted(layers, points)]  # the share of a forward pass from then on
        work = np.zeros(len(points))
        for request, time in zip(self.queue, times, strict=True):
            seconds = profile.prefill(requests.prompt[request]) * self.slowdown
            work += seconds * np.where(points <= time, 1.0, late)
            end = np.max(points + work, initial=self.layer_arrivals[-1], where=work > 0)
            self.streamed_ends.append(float(end))

    def _accrue(self, now: float) -> None:
        """Credit the decoding since the last call."""
        if self.prefilling < 0 and self.decoding:
            self.progress += (now - self.since) / self.step_s
        self.since = now

    def fire(self) -> None:
        """End the prefill, or the decoding of the requests that are done."""
        now = self.clock.now
        self._accrue(now)
        if self.prefilling >= 0:
            request, self.prefilling = self.prefilling, -1
            left = self.requests.output[request] - 1
            if left > 0:
                heappush(self.decoding, (self.progress + left, request))
                self.step_s = self.profile.decode(len(self.decoding)) * self.slowdown
            else:
                self._finish(request)
            self.owner.on_first_token(self, request)
        else:
            decoding, reached = self.decoding, self.progress + 1e-6
            while decoding and decoding[0][0] <= reached:
                self._finish(heappop(decoding)[1])
            self.step_s = self.profile.decode(len(decoding)) * self.slowdown
        # The owner may have assigned a request or stopped this instance in a callback.
        if self.prefilling < 0 and not self.ended:
            self._schedule_next(now)

    def _finish(self, request: int) -> None:
        self.request_count -= 1
        self.kv_tokens -= self.requests.tokens[request]
        self.owner.on_finished(self, request)

    def _schedule_next(self, now: float) -> None:
        """Begin the next prefill, or else decode until the first request is done."""
        if self.queue:
            request = self.queue.popleft()
            seconds = self.profile.prefill(self.requests.prompt[request])
            self.queued_prefill_s -= seconds
            streamed = self.streamed_ends
            end = streamed.popleft() if streamed else now + seconds * self.slowdown
            self.prefilling, self.prefill_end = request, end
            self.clock.schedule(self, end)
        elif self.decoding:
            wait = (self.decoding[0][0] - self.progress) * self.step_s
            self.clock.schedule(self, now + wait)
        else:
            self.clock.cancel(self)
        computing = self.prefilling >= 0 or bool(self.decoding)
        if computing != self.computing:
            self.computing = computing
            self.owner.on_computing(self)
        if not computing:
            self.idle_since = now
            self.owner.on_idle(self)
