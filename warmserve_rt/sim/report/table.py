"""The table of a study's policies, for the terminal and the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from warmserve_rt.sim.study.digest import as_interval
from warmserve_rt.sim.study.intervals import Interval
from warmserve_rt.sim.study.study import GOALS

from .sentences import number

Write = Callable[[float, int], str]  # formats a value with a number of digits


def percent(value: float, digits: int = 3) -> str:
    return f"{100 * value:.{digits}g} %" if math.isfinite(value) else "-"


def _scaled(scale: float) -> Write:
    return lambda value, digits: number(value * scale, digits)


# Metric, heading, format of its values.
_COLUMNS: tuple[tuple[str, str, Write], ...] = (
    ("ttft_mean", "TTFT mean (s)", number),
    ("ttft_p50", "P50 (s)", number),
    ("ttft_p95", "P95 (s)", number),
    ("ttft_p99", "P99 (s)", number),
    ("slo_miss", "over SLO", percent),
    ("hit_share", "layer hits", percent),
    ("loaded_bytes", "loaded (TB)", _scaled(1e-12)),
    ("wasted_bytes", "wasted (TB)", _scaled(1e-12)),
    ("gpu_hours", "GPU hours", number),
)
HEADINGS = (
    "policy",
    *(heading for _, heading, _ in _COLUMNS[:5]),
    *(f"rate at {100 * goal:g} %" for goal in GOALS),
    *(heading for _, heading, _ in _COLUMNS[5:]),
)
WAITS = 8  # the number of columns about the waits of requests; the others are about costs
Cell = tuple[str, str]  # a value, and its uncertainty


def rows(data: dict[str, Any]) -> list[list[Cell]]:
    """Return a row for each policy, in the columns of HEADINGS."""
    found = []
    for name, policy in data["policies"].items():
        cells = [
            _cell(as_interval(policy["metrics"][metric]), write) for metric, _, write in _COLUMNS
        ]
        highest = [_highest(each) for each in policy["highest_rate"]]
        found.append([(name, policy["title"]), *cells[:5], *highest, *cells[5:]])
    return found


def _cell(each: Interval, write: Write) -> Cell:
    if each.low is None or each.high is None:
        return write(each.mean, 3), ""
    return write(each.mean, 3), f"±{write((each.high - each.low) / 2, 2)}"


def _highest(each: dict[str, Any]) -> Cell:
    if each["rate"] is None:
        return "none", ""
    return f"{each['rate']:.3g}", "not all below" if each["failing"] else ""
