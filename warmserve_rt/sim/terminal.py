"""A study on the terminal: its progress, its table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .._terminal import make_console, plain, print_table
from . import columns, study, words
from .study import Result, Study


def run(asked: Study, jobs: int) -> Result:
    """As study.run does, with a bar on stderr."""
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
        progress.start()  # not before: what cannot be run is said without a bar
        progress.update(task, completed=done, total=runs)

    try:
        return study.run(asked, jobs, update)
    finally:
        if progress.live.is_started:
            progress.stop()


def show(data: dict[str, Any]) -> None:
    """The summary of a result's digest, in tables and in words."""
    described = data["study"]
    console = make_console()
    title = (
        f"{plain(data['workload']['name'])}: {len(data['workload']['models'])} models on "
        f"{described['hardware']['devices']} GPUs, {described['rate']:.3g} requests/s for "
        f"{described['minutes']:.3g} minutes, seeds: {described['seeds']}"
    )
    console.print(Text(title))
    every = [[(row[0][0], ""), *row[1:]] for row in columns.rows(data)]
    waits, costs = columns.HEADINGS[: columns.WAITS], columns.HEADINGS[columns.WAITS :]
    print_table(console, waits, [row[: columns.WAITS] for row in every])
    print_table(console, ("policy", *costs), [[row[0], *row[columns.WAITS :]] for row in every])
    for sentences in (words.findings(data), words.rates(data), words.engine_start(data)):
        if sentences:
            console.print(Text(" ".join(sentences)))
