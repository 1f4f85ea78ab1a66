"""Serves a live run's requests in real time, from a runtime under the scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np

from warmserve_rt import testing
from warmserve_rt.scheduling.fleet import RuntimeFleet
from warmserve_rt.scheduling.loop import Loop
from warmserve_rt.scheduling.scheduler import Scheduler

from . import report
from .measure import Costs
from .predicted import BEFORE_S, Outcome
from .rows import Say
from .run import Cast
from .traffic import TRACE_S, Traffic, forecaster
from .transformers_rows import Transformers, generate


class Served(NamedTuple):
    """The result of a run."""

    outcome: Outcome
    costs: dict[str, float]  # mean seconds: to the first token, of a decode step, of a check
    wrong: int  # answers with wrong tokens
    bytes_match: bool  # whether every leased byte was right
    errors: list[str]


class Tenants(Transformers):
    """The tenants in one runtime, served while their layers are still loading."""

    @contextmanager
    def answering(self, tenant: str) -> Iterator[Say]:
        with self.runtime.lease(tenant, streaming=True) as lease:
            self._leased = lease
            if self._mutation:
                for layer in (1, 2):
                    lease.wait(layer)
                model = self._models[tenant]
                testing.swap_granules(self.runtime, model, 1, model, 2)
                self._mutation = None
            yield partial(generate, self.modules[tenant])

    def compare(self, tenant: str) -> bool:
        """Lease a model and return whether it has the bytes of its file."""
        with self.runtime.lease(tenant) as lease:
            self._leased = lease
            return self.bytes_match(tenant)

    def leading(self, tenant: str) -> int:
        """Return the number of resident layers before the first missing one."""
        layers = self.runtime.snapshot().models[tenant].layers
        missing = (i for i, layer in enumerate(layers) if layer.residency != "resident")
        return next(missing, len(layers))


class Line:
    """A thread-safe queue of requests.

    The next request is the first for the model served last; without one, the first of all. The
    simulated instance serves in the same order.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str]] = []
        self._come = threading.Condition()  # protects _waiting

    def put(self, number: int, tenant: str) -> None:
        with self._come:
            self._waiting.append((number, tenant))
            self._come.notify()

    def take(self, last: str) -> int:
        with self._come:
            self._come.wait_for(lambda: self._waiting)
            same = (place for place, (_, each) in enumerate(self._waiting) if each == last)
            return self._waiting.pop(next(same, 0))[0]


def scheduler_for(seconds: float) -> Scheduler:
    """Return a scheduler whose memory is shortened by the factor that compresses the trace."""
    return Scheduler(memory=120.0 * seconds / TRACE_S)


def serve_live(
    tenants: Tenants,
    cast: Cast,
    asked: Traffic,
    costs: Costs,
    seconds: float,
    bars: report.Bars,
) -> Served:
    """Serve the requests in real time; they arrive within ``seconds``."""
    profiles = asked.workload.models
    zero = time.monotonic() + BEFORE_S
    before = tenants.bytes_moved()

    def clock() -> float:
        return time.monotonic() - zero

    count = len(asked.requests)
    ttft, hits, wrong, bytes_match = np.zeros(count), 0, 0, True
    errors: list[str] = []
    steps: list[tuple[float, float, float]] = []  # per request: first token, decode step, check
    line, last = Line(), ""
    arrivals = Loop(clock, lambda error: errors.append(repr(error)))
    fleet = RuntimeFleet(
        [tenants.runtime],
        profiles,
        bandwidth=0.95 * costs.bandwidth,
        switch_s=costs.switch_s,
        clock=clock,
    )

    def arrive(number: int) -> None:
        request = asked.requests[number]
        fleet.arrived(request.tenant, len(cast.prompts[request.prompt]))
        line.put(number, request.tenant)

    for number, request in enumerate(asked.requests):
        arrivals.after(request.time - clock(), partial(arrive, number))
    try:
        fleet.begin(scheduler_for(seconds), forecaster(asked.workload), [*asked.workload.service])
        fleet.start()
        arrivals.start()
        for done in range(count):
            number = line.take(last)
            request = asked.requests[number]
            last = request.tenant
            hits += tenants.leading(last)
            turn = clock()
            with tenants.serving(last) as say:
                answer: list[int] = []
                length = asked.outputs[number]
                for token in say(cast.prompts[request.prompt], length, -1):
                    ttft[number] = ttft[number] or clock() - request.time
                    answer.append(token)
                answered, first = clock(), ttft[number] + request.time
                bytes_match &= tenants.bytes_match(last)
                step = (answered - first) / max(len(answer) - 1, 1)
                steps.append((first - turn, step, clock() - answered))
            fleet.finished(last)
            wrong += answer != cast.wanted[last, request.prompt][:length]
            detail = f"{last:9} {ttft[number] * 1e3:5.0f} ms"
            bars.show("live", done + 1, count, detail)
    finally:
        arrivals.close()
        fleet.close()
    errors += [repr(error) for error in fleet.errors]
    layers = count * len(profiles[0].layer_bytes)
    moved = tenants.bytes_moved() - before
    means = (float(f"{mean:.4g}") for mean in np.mean(steps, axis=0))
    served = dict(zip(("first_token_s", "decode_s", "check_s"), means, strict=True))
    return Served(Outcome(ttft, hits / layers, float(moved)), served, wrong, bytes_match, errors)
