"""The demo's output: progress bars, a table and a JSON object."""

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
[bold]Five language models, room for two.[/] One torch thread serves SmolLM2-135M and four tunings \
of it in float32, one request at a time, while the other core loads. The host device replaces an \
accelerator here: its arena is ordinary memory, limited to half of the models' unique bytes. The \
times are therefore those of this machine, and the table has a row that an accelerator cannot \
have: lazy mmap. The demo compares every token with plain transformers and every leased byte with \
its file.
""",
    "vllm": """\
[bold]Five engines, room for two.[/] vLLM serves SmolLM2-135M and four tunings of it in float32, \
one request at a time on one thread, while the other core loads. One process has an engine for \
each model, with their weights in an arena of half of the models' unique bytes. The first row is \
plain vLLM, which restarts at every switch. The demo compares every token with plain vLLM and \
every byte with the output of vLLM's own loader.
""",
}

_TTFT = """\
TTFT: time from a request's arrival to its first token, in ms. Hit: the weights were resident when \
serving of the request began. The columns hits and misses show a count, the p50 and, in \
parentheses, the p50 without the time in the queue. Moved: GB copied into memory"""
NOTE = {
    "transformers": _TTFT
    + """; mmap copies nothing, but the page cache behind it \
holds all five files outside any budget.
""",
    "vllm": _TTFT
    + """. Our engines start once, before the first request; the table \
does not include these starts.
""",
}


@dataclass(slots=True)
class Result:
    """The outcome of a row."""

    name: str
    title: str
    answers: list[Answer] = field(default_factory=list)
    bytes_moved: int = 0
    wrong: int = 0  # answers that differ from the plain engine's

    def ttft(self, hit: bool | None = None) -> dict[str, float]:
        """Return percentiles in milliseconds of all answers, or of only the hits or the misses.

        `turn_p50` excludes the time in the queue.
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
        """Whether every lease had the bytes of its file; None if the row leases nothing."""
        checked = [a.bytes_match for a in self.answers if a.bytes_match is not None]
        return all(checked) if checked else None

    @property
    def occupancy(self) -> float | None:
        """Mean share of the arena that held weights at the end of an answer."""
        known = [a.occupancy for a in self.answers if a.occupancy is not None]
        return sum(known) / len(known) if known else None


def summary(results: Sequence[Result], **facts: Any) -> dict[str, Any]:
    """Return the JSON object, including `facts` unchanged."""
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
    """Return a table of the results, one line each."""
    made = Table(
        title=f"TTFT in ms: the same requests, served in {len(results)} ways",
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
    """Return a table of each tenant's answer to one question."""
    made = Table(title=Text(plain(question)), title_justify="left", show_header=False)
    for tenant, answer in answers.items():
        made.add_row(Text(plain(tenant)), Text(plain(answer)))
    return made


class Screen:
    """The terminal: progress bars at the bottom, all other output above them."""

    def __init__(self) -> None:
        self.console = make_console()

    @contextmanager
    def bars(self) -> Iterator[Bars]:
        """Yield bars that are live while the context lasts."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
        )
        details = (TimeElapsedColumn(), TextColumn("{task.fields[detail]}", markup=False))
        with Progress(*columns, *details, console=self.console) as progress:
            yield Bars(progress)


class Bars:
    """Progress bars by name. A bar is made at the first call with its name."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def show(self, name: str, done: int, total: int, detail: str = "") -> None:
        """Set the bar `name` to `done` of `total`."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, detail=detail)
        self._progress.update(self._tasks[name], completed=done, total=total, detail=detail)
