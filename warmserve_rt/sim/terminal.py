"""A study on the terminal: its progress, its table."""

from __future__ import annotations

from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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
    console = Console()
    title = (
        f"{data['workload']['name']}: {len(data['workload']['models'])} models on "
        f"{described['hardware']['devices']} GPUs, {described['rate']:.3g} requests/s for "
        f"{described['minutes']:.3g} minutes, seeds: {described['seeds']}"
    )
    console.print(title, highlight=False)
    every = columns.rows(data)
    for shown in (range(columns.WAITS), (0, *range(columns.WAITS, len(columns.HEADINGS)))):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for place in shown:
            justify: Literal["left", "right"] = "right" if place else "left"
            table.add_column(columns.HEADINGS[place], justify=justify, no_wrap=not place)
        for (name, _), *cells in every:
            row = [(name, ""), *cells]
            table.add_row(*(_cell(row[place]) for place in shown))
        console.print(table)
    for sentences in (words.findings(data), words.rates(data), words.engine_start(data)):
        if sentences:
            console.print(" ".join(sentences), highlight=False)


def _cell(cell: columns.Cell) -> Text:
    value, more = cell
    return Text.assemble(value, ("\n" + more if more else "", "dim"))
