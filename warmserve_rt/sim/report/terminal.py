"""Show a study on the terminal: its progress and its tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from warmserve_rt._terminal import make_console, plain, print_table
from warmserve_rt.sim.study import runner
from warmserve_rt.sim.study.runner import Result
from warmserve_rt.sim.study.study import Study

from . import sentences, table


def run(study: Study, jobs: int) -> Result:
    """Run a study as runner.run does, with a progress bar on stderr."""
    shown = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    progress = Progress(*shown, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("simulating", total=None)

    def update(done: int, runs: int) -> None:
        progress.start()  # not earlier: a refused study shows no bar
        progress.update(task, completed=done, total=runs)

    try:
        return runner.run(study, jobs, update)
    finally:
        if progress.live.is_started:
            progress.stop()


def show(data: dict[str, Any]) -> None:
    """Print the summary of a result's digest, in tables and sentences."""
    described = data["study"]
    console = make_console()
    title = (
        f"{plain(data['workload']['name'])}: {len(data['workload']['models'])} models on "
        f"{described['hardware']['devices']} GPUs, {described['rate']:.3g} requests/s for "
        f"{described['minutes']:.3g} minutes, seeds: {described['seeds']}"
    )
    console.print(Text(title))
    every = [[(row[0][0], ""), *row[1:]] for row in table.rows(data)]
    waits, costs = table.HEADINGS[: table.WAITS], table.HEADINGS[table.WAITS :]
    print_table(console, waits, [row[: table.WAITS] for row in every])
    print_table(console, ("policy", *costs), [[row[0], *row[table.WAITS :]] for row in every])
    for prose in (sentences.findings(data), sentences.rates(data), sentences.engine_start(data)):
        if prose:
            console.print(Text(" ".join(prose)))
