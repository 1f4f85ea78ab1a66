"""The scheduler at work on a real runtime, beside what the simulator says of the same run."""

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
[bold]The scheduler on a real runtime, and the simulator's word for it.[/] The demo's five \
models are asked what a recorded service was asked, faster. Layers come in by forecast, leases \
begin while layers are still on their way, and the simulator serves the same requests with the \
costs that were measured before; and afterwards once more, with those of the run itself.
"""
ROWS = {
    "ttft_mean_ms": "TTFT, mean (ms)",
    "ttft_p50_ms": "TTFT, median (ms)",
    "ttft_p95_ms": "TTFT, 95th percentile (ms)",
    "layer_hits": "layers there when asked for",
    "loaded_gb": "loaded (GB)",
}


class Tenants(Transformers):
    """The tenants in one runtime, served while layers are on their way."""

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
        """Whether a model that can be leased has its file's bytes."""
        with self.runtime.lease(tenant) as lease:
            self._leased = lease
            return self.bytes_match(tenant)

    def leading(self, tenant: str) -> int:
        """How many layers are resident, counted from the first."""
        layers = self.runtime.snapshot().models[tenant].layers
        missing = (i for i, layer in enumerate(layers) if layer.residency != "resident")
        return next(missing, len(layers))


class Line:
    """Requests that have come, and whose turn it is: the next of the model that was served last,
    or else the first that came. The simulated instance serves in that order too."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str]] = []
        self._come = threading.Condition()  # over _waiting

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
    """Serve `requests` requests that arrive within `seconds`, print what was predicted and what
    was measured, and write `json_path`, if given.

    Returns the exit status: 0 if every token and every leased byte is right, else 1. `mutate`
    swaps granules of two layers, to see that it is noticed. Raises ValueError for a run
    without requests, RuntimeError if the models cannot be made.
    """
    if requests < 2 or not 0 < seconds <= TRACE_S:
        raise ValueError(f"{requests} requests in {seconds} s: at least 2, in up to {TRACE_S:g} s")
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
    """One that remembers arrivals for as much less as they come faster."""
    return Scheduler(memory=120.0 * seconds / TRACE_S)


def _at_the_speed(costs: Costs, served: Mapping[str, float]) -> Costs:
    """The costs on the machine as it was while it served, which others may have used too: decode
    steps and checks as they were, and all other computing as much slower as the steps."""
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
    """The comparison after an answer is a part of serving it, and so of its decoding."""
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
    """What was measured, with means of what the costs are of, how many answers were wrong, whether
    the bytes matched, and errors."""
    profiles = asked.workload.models
    zero = time.monotonic() + BEFORE_S
    before = tenants.bytes_moved()

    def clock() -> float:
        return time.monotonic() - zero

    count = len(asked.requests)
    ttft, hits, wrong, bytes_match = np.zeros(count), 0, 0, True
    errors: list[str] = []
    steps: list[tuple[float, float, float]] = []  # of each request: prefill, decode step, check
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
