"""Runs the scheduler on a real runtime and compares the run with its simulation."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from warmserve_rt._terminal import print_whole
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.scheduling.registered_models import profile_of

from . import report
from .content import unique_granules
from .live_serving import Tenants, scheduler_for, serve_live
from .measure import Costs, measure
from .predicted import Outcome, predict
from .run import GRANULE, TOKENS, prepare, quiet, warm_up
from .traffic import PROMPTS, TRACE_S, Traffic, traffic

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
                scheduler_for(seconds),
                arena=arena,
                bandwidth=costs.bandwidth,
                switch_s=costs.switch_s,
            )

        asked, predicted = predicted_with(costs)
        with screen.bars() as bars:
            served = serve_live(tenants, cast, asked, costs, seconds, bars)
        afterwards = predicted_with(_at_the_speed(costs, served.costs))[1]
    finally:
        tenants.close()
    outcome = {
        "tokens_match": not served.wrong,
        "bytes_match": served.bytes_match,
        "requests": len(asked.requests),
        "seed": seed,
        "workload": asked.workload.name,
        "arena_bytes": arena,
        "load_average": os.getloadavg()[0],
        "costs": costs.numbers(),
        "predicted": predicted.numbers(),
        "predicted_afterwards": afterwards.numbers(),
        "measured": served.outcome.numbers(),
        "while_serving": served.costs,
        "errors": served.errors,
    }
    print_whole(screen.console, _table(predicted, afterwards, served.outcome))
    screen.console.print(
        Text(
            f"{len(asked.requests)} requests. Measured before: {json.dumps(costs.numbers())}\n"
            f"While serving: {json.dumps(served.costs)}"
        )
    )
    if json_path is not None:
        Path(json_path).write_text(json.dumps(outcome, indent=2) + "\n")
    if outcome["tokens_match"] and outcome["bytes_match"]:
        screen.console.print("[bold green]Every token and every leased byte is right.[/]")
        return 0
    screen.console.print("[bold red]FAILED: tokens or bytes differ.[/]")
    return 1


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


def _table(*outcomes: Outcome) -> Table:
    made = Table(box=box.SIMPLE, padding=0)
    for column in ("", "predicted", "afterwards", "measured"):
        made.add_column(column, justify="right" if column else "left", min_width=10)
    all_numbers = [outcome.numbers() for outcome in outcomes]
    for key, title in ROWS.items():
        made.add_row(title, *(f"{numbers[key]:g}" for numbers in all_numbers))
    return made
