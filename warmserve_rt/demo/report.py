"""What the demo shows while it runs and what it concludes: progress, a table, a JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from warmserve_rt._terminal import make_console, plain

from .serve import Answer

INTRODUCTION = {
    "transformers": """\
[bold]Five language models, room for two.[/] SmolLM2-135M and four tunings of it in float32 are \
served one request at a time by one torch thread, while the other core loads. The host device \
stands in for an accelerator here: its arena is ordinary memory, held to half of what the models' \
different contents take. Times are therefore this machine's, and there is a row that no \
accelerator has: lazy mmap. Every token is compared with plain transformers', every leased byte \
with its file's.
""",
    "vllm": """\
[bold]Five engines, room for two.[/] vLLM serves SmolLM2-135M and four tunings of it in float32, \
one request at a time on one thread, while the other core loads: an engine for each in one \
process, their weights in an arena of half of what the models' different contents take, beside \
vLLM as it is, which has to start anew at every switch. Every token is compared with plain \
vLLM's, every byte with what its own loader had made.
""",
}

_TTFT = """\
TTFT: time from a request's arrival to its first token, in ms. Hit: the weights were there when \
its turn came; how many, p50, and in parentheses p50 from its turn on, without the queue. Moved: \
GB copied into memory"""
NOTE = {
    "transformers": _TTFT
    + """; what mmap shows is copied by nobody, and the page cache behind it \
holds all five files outside of any budget.
""",
    "vllm": _TTFT
    + """. Our engines start before the first request comes, and only once: that \
is not in the table.
""",
}


@dataclass(slots=True)
class Result:
    """A row's outcome."""

    name: str
    title: str
    answers: list[Answer] = field(default_factory=list)
    bytes_moved: int = 0
    wrong: int = 0  # answers that are not plain transformers'

    def ttft(self, hit: bool | None = None) -> dict[str, float]:
        """Percentiles in milliseconds, of all answers or of hits or misses alone.

        `turn_p50` counts from when the request's turn came, without its time in the queue.
        """
        some = [a for a in self.answers if hit is None or a.hit is hit]
        if not some:
            return {"count": 0}
        p50, p99 = np.percentile([a.ttft for a in some], [50, 99]) * 1e3
        turn = np.median([a.ttft - a.waited for a in some]) * 1e3
        times = {"p50": p50, "p99": p99, "turn_p50": turn}
        return {"count": len(some), **{key: round(float(ms), 1) for key, ms in times.items()}}

    @property
    def bytes_match(self) -> bool | None:
        """Whether every lease showed its file's bytes; None where nothing is leased."""
        checked = [a.bytes_match for a in self.answers if a.bytes_match is not None]
        return all(checked) if checked else None

    @property
    def occupancy(self) -> float | None:
        """Mean part of the arena that held weights at the end of an answer."""
        known = [a.occupancy for a in self.answers if a.occupancy is not None]
        return sum(known) / len(known) if known else None


def summary(results: Sequence[Result], **facts: Any) -> dict[str, Any]:
    """The JSON object; `facts` are put in as they are."""
    leased = [r.bytes_match for r in results if r.bytes_match is not None]
    return {
        "tokens_match": not any(r.wrong for r in results),
        "bytes_match": bool(leased) and all(leased),
        **facts,
        "ttft_ms": {
            r.name: {**r.ttft(), "hits": r.ttft(hit=True), "misses": r.ttft(hit=False)}
            for r in results
        },
        "bytes_moved": {r.name: r.bytes_moved for r in results},
        "arena_occupancy": {
            r.name: round(r.occupancy, 3) for r in results if r.occupancy is not None
        },
    }


def table(results: Sequence[Result]) -> Table:
    """The rows side by side."""
    made = Table(
        title=f"TTFT in ms: the same requests, {len(results)} ways",
        title_justify="left",
        box=box.SIMPLE,
        padding=0,
    )
    made.add_column("", no_wrap=True)
    for column in ("p50", "p99", "hits", "misses", "moved", "arena"):
        made.add_column(column, justify="right")
    made.add_column("tokens")
    made.add_column("bytes")
    for r in results:
        every = r.ttft()
        made.add_row(
            r.title,
            *(f"{every[p]:.0f}" for p in ("p50", "p99")),
            *(_split(r.ttft(hit)) for hit in (True, False)),
            f"{r.bytes_moved / 1e9:.1f}G",
            "" if r.occupancy is None else f"{r.occupancy:.0%}",
            f"[bold red]{r.wrong} wrong[/]" if r.wrong else "equal",
            {None: "", True: "equal", False: "[bold red]differ[/]"}[r.bytes_match],
        )
    return made


def _split(times: Mapping[str, float]) -> str:
    if not times["count"]:
        return "0"
    return f"{times['count']}: {times['p50']:.0f} ({times['turn_p50']:.0f})"


def samples(question: str, answers: Mapping[str, str]) -> Table:
    """What each tenant says to one question."""
    made = Table(title=Text(plain(question)), title_justify="left", show_header=False)
    for tenant, answer in answers.items():
        made.add_row(Text(plain(tenant)), Text(plain(answer)))
    return made


class Screen:
    """The terminal: a bar for what is going on, and everything else above it."""

    def __init__(self) -> None:
        self.console = make_console()

    @contextmanager
    def bars(self) -> Iterator[Bars]:
        """Bars, live while the context lasts."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
        )
        details = (TimeElapsedColumn(), TextColumn("{task.fields[detail]}", markup=False))
        with Progress(*columns, *details, console=self.console) as progress:
            yield Bars(progress)


class Bars:
    """Bars by name, each made when it is first heard of."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def show(self, name: str, done: int, total: int, detail: str = "") -> None:
        """Set the bar `name` to `done` of `total`."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, detail=detail)
        self._progress.update(self._tasks[name], completed=done, total=total, detail=detail)
