"""Runs the scheduler on a real runtime and compares the run with its simulation."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from warmserve_rt import testing
from warmserve_rt._terminal import print_whole
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.scheduling.fleet import RuntimeFleet, profile_of
from warmserve_rt.scheduling.loop import Loop
from warmserve_rt.scheduling.scheduler import Scheduler

from . import report
from .content import unique_granules
from .measure import Costs, measure
from .predicted import BEFORE_S, Outcome, predict
from .rows import Say
from .run import GRANULE, TOKENS, Cast, prepare, quiet, warm_up
from .traffic import PROMPTS, TRACE_S, Traffic, forecaster, traffic
from .transformers_rows import Transformers, generate

INTRODUCTION = """\
[bold]The scheduler on a real runtime, and its simulation.[/] The demo's five models receive the \
requests of a recorded service, compressed in time. The scheduler prewarms layers by forecast, and \
leases begin while layers are still loading. The simulator serves the same requests twice: before \
the run with costs measured on an idle runtime, and afterwards with costs measured during the run.
"""
ROWS = {
    "ttft_mean_ms": "TTFT, mean (ms)",
    "ttft_p50_ms": "TTFT, median (ms)",
    "ttft_p95_ms": "TTFT, 95th percentile (ms)",
    "layer_hits": "layers resident when needed",
    "loaded_gb": "loaded (GB)",
}


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


def run(
    json_path: str | os.PathLike[str] | None = None,
    *,
    requests: int = 40,
    seconds: float = 90.0,
    seed: int = 0,
    mutate: bool = False,
) -> int:
    """Serve recorded requests and print predicted and measured times.

    Parameters
    ----------
    json_path : path, optional
        Write the results to this file as JSON.
    requests : int
        Number of requests, at least 2.
    seconds : float
        Time within which the requests arrive, at most ``TRACE_S`` seconds.
    seed : int
        Seed of the choice of requests.
    mutate : bool
        Swap granules of two layers, to check that the run notices.

    Returns
    -------
    int
        The exit status: 0 if every token and every leased byte is right, else 1.

    Raises
    ------
    ValueError
        ``requests`` or ``seconds`` is out of range.
    RuntimeError
        The models cannot be made.
    """
    if requests < 2 or not 0 < seconds <= TRACE_S:
        raise ValueError(
            f"requests must be at least 2 and seconds in (0, {TRACE_S:g}], "
            f"got {requests} and {seconds}"
        )
    quiet()
    screen = report.Screen()
    screen.console.print(INTRODUCTION)
    cast = prepare(screen, PROMPTS)
    warm_up(cast)
    arena = unique_granules(cast.contents.values()) // 2 * GRANULE
    mutation = random.Random(seed) if mutate else None
    tenants = Tenants(cast.tenants, cast.contents, arena, mutation=mutation)
    try:
        costs = measure(
            tenants.runtime, tenants.modules, [*cast.prompts.values()], tenants.compare, TOKENS
        )

        def predicted_with(costs: Costs) -> tuple[Traffic, Outcome]:
            asked = traffic(
                _profiles(tenants, costs),
                cast.prompts,
                cast.wanted,
                count=requests,
                seconds=seconds,
                seed=seed,
            )
            return asked, predict(
                asked.workload,
                _scheduler(seconds),
                arena=arena,
                bandwidth=costs.bandwidth,
                switch_s=costs.switch_s,
            )

        asked, predicted = predicted_with(costs)
        with screen.bars() as bars:
            measured, served, wrong, bytes_match, errors = _serve(
                tenants, cast, asked, costs, seconds, bars
            )
        afterwards = predicted_with(_at_the_speed(costs, served))[1]
    finally:
        tenants.close()
    outcome = {
        "tokens_match": not wrong,
        "bytes_match": bytes_match,
        "requests": len(asked.requests),
        "seed": seed,
        "workload": asked.workload.name,
        "arena_bytes": arena,
        "load_average": os.getloadavg()[0],
        "costs": costs.numbers(),
        "predicted": predicted.numbers(),
        "predicted_afterwards": afterwards.numbers(),
        "measured": measured.numbers(),
        "while_serving": served,
        "errors": errors,
    }
    print_whole(screen.console, _table(predicted, afterwards, measured))
    screen.console.print(
        Text(
            f"{len(asked.requests)} requests. Measured before: {json.dumps(costs.numbers())}\n"
            f"While serving: {json.dumps(served)}"
        )
    )
    if json_path is not None:
        Path(json_path).write_text(json.dumps(outcome, indent=2) + "\n")
    if outcome["tokens_match"] and outcome["bytes_match"]:
        screen.console.print("[bold green]Every token and every leased byte is right.[/]")
        return 0
    screen.console.print("[bold red]FAILED: tokens or bytes differ.[/]")
    return 1


def _scheduler(seconds: float) -> Scheduler:
    """Return a scheduler whose memory is shortened by the factor that compresses the trace."""
    return Scheduler(memory=120.0 * seconds / TRACE_S)


def _at_the_speed(costs: Costs, served: Mapping[str, float]) -> Costs:
    """Return the costs during the run, when other processes may have used the machine too.

    Decode steps and checks are as measured in the run. All other computing is scaled by the
    slowdown of the decode steps.
    """
    slower = served["decode_s"] / costs.decode_s
    return replace(
        costs,
        switch_s=costs.switch_s * slower,
        prefill_s=costs.prefill_s * slower,
        prefill_token_s=costs.prefill_token_s * slower,
        decode_s=served["decode_s"],
        check_s=served["check_s"],
    )


def _profiles(tenants: Tenants, costs: Costs) -> list[ModelProfile]:
    """Return the tenants' profiles. The check after an answer counts as part of its decoding."""
    return [
        profile_of(
            tenants.runtime.model(name),
            prefill_s=costs.prefill_s,
            prefill_token_s=costs.prefill_token_s,
            decode_s=costs.decode_s + costs.check_s / (TOKENS - 1),
            granule=GRANULE,
        )
        for name in tenants.modules
    ]


def _serve(
    tenants: Tenants,
    cast: Cast,
    asked: Traffic,
    costs: Costs,
    seconds: float,
    bars: report.Bars,
) -> tuple[Outcome, dict[str, float], int, bool, list[str]]:
    """Serve the requests in real time.

    Returns the outcome, the mean costs during the run, the number of wrong answers, whether all
    bytes matched, and errors.
    """
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
        fleet.begin(_scheduler(seconds), forecaster(asked.workload), [*asked.workload.service])
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
    return Outcome(ttft, hits / layers, float(moved)), served, wrong, bytes_match, errors


def _table(*outcomes: Outcome) -> Table:
    made = Table(box=box.SIMPLE, padding=0)
    for column in ("", "predicted", "afterwards", "measured"):
        made.add_column(column, justify="right" if column else "left", min_width=10)
    all_numbers = [outcome.numbers() for outcome in outcomes]
    for key, title in ROWS.items():
        made.add_row(title, *(f"{numbers[key]:g}" for numbers in all_numbers))
    return made
