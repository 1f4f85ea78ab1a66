"""Describe the numbers of a study in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from warmserve_rt.sim.controllers.policies import POLICIES
from warmserve_rt.sim.study.digest import as_interval
from warmserve_rt.sim.study.intervals import Interval

from .charts import seconds

PAPER_FACTOR = 50.8  # by which the paper's tail TTFT is below that of autoscaling


def number(value: float, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "unbounded" if value > 0 else "-"
    if value and abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def time(value: float) -> str:
    return seconds(float(f"{value:.3g}")) if math.isfinite(value) else "unbounded"


def times(each: Interval) -> str:
    """Return a ratio as text, with its interval if it has one. Unbounded times have no ratio."""
    if not comparable(each):
        return "not comparable"
    if each.low is None or each.high is None:
        return f"{number(each.mean)}x"
    return f"{number(each.mean)}x ({number(each.low)} to {number(each.high)})"


def comparable(each: Interval) -> bool:
    """Return whether both values of a ratio are positive and finite."""
    return math.isfinite(each.mean) and each.mean > 0


def listed(items: Sequence[str]) -> str:
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def findings(data: dict[str, Any]) -> list[str]:
    """Return sentences about the policy with the shortest waits, and whether the seeds prove it."""
    policies = data["policies"]
    real = {k: p for k, p in policies.items() if not _is_bound(k, p)} or policies
    order = sorted(real, key=lambda name: _tail(policies[name]).mean)
    best = order[0]
    tail = _tail(policies[best]).mean
    miss = policies[best]["metrics"]["slo_miss"]["mean"]
    late = f"{100 * miss:.3g} % of requests over the SLO"
    if not math.isfinite(tail):
        said = [f"No policy served all requests in {_seeds(data)}: no P99 TTFT is bounded."]
    elif len(order) == 1:
        said = [f"{best} has a P99 TTFT of {time(tail)} over {_seeds(data)}, with {late}."]
    else:
        said = [
            f"Among the policies other than bounds, {best} has the lowest P99 "
            f"TTFT, {time(tail)} on average over {_seeds(data)}, with {late}."
        ]
        said.append(_next(data, order[1], best))
    misses = {name: policies[name]["metrics"]["slo_miss"]["mean"] for name in real}
    least = min(misses, key=lambda name: misses[name])
    if misses[least] < misses[best]:
        said.append(f"{least} has the fewest requests over the SLO, {100 * misses[least]:.3g} %.")
    said += [_bound(data, name, tail) for name in policies if name not in real]
    medians = {name: policies[name]["metrics"]["ttft_p50"]["mean"] for name in real}
    quick = min(medians, key=lambda name: medians[name])
    if medians[quick] < medians[best]:
        said.append(f"{quick} has the lowest median TTFT, {time(medians[quick])}.")
    lost = [k for k, p in policies.items() if p["metrics"]["unserved"]["mean"] > 0]
    if lost:
        said.append(
            f"{listed(lost)} left requests without a first token an hour after the last arrival; "
            "their times count as infinite."
        )
    return said


def _is_bound(name: str, policy: dict[str, Any]) -> bool:
    """Return whether a policy has memory or knowledge that no real policy can have."""
    return policy["unlimited_memory"] or (name in POLICIES and POLICIES[name].bound)


def _next(data: dict[str, Any], second: str, best: str) -> str:
    apart, tail = _ratio(data, second, best), _tail(data["policies"][second]).mean
    if tail == _tail(data["policies"][best]).mean:
        return f"{second} has the same P99 TTFT."
    if not comparable(apart):
        return (
            f"The P99 of the next, {second}, is {'unbounded' if math.isinf(tail) else time(tail)}."
        )
    sure = apart.low is not None and apart.low > 1
    doubt = "" if sure else ": these seeds do not tell the two apart"
    return f"The P99 of the next, {second}, is {times(apart)} as long{doubt}."


def _bound(data: dict[str, Any], name: str, best: float) -> str:
    """Return a sentence that compares a bound with ``best``, the P99 of the best other policy."""
    policy = data["policies"][name]
    tail = _tail(policy).mean
    has = "memory for everything" if policy["unlimited_memory"] else "knowledge of the future"
    if tail < best:
        return f"{name}, a bound with {has}, has a P99 of {time(tail)}."
    return f"The P99 of {name}, which has {has}, is no lower, {time(tail)}: it shows no bound here."


def rates(data: dict[str, Any]) -> list[str]:
    """Return sentences about rates of the grid that fail below a rate that passes."""
    said = []
    for name, policy in data["policies"].items():
        for highest in policy["highest_rate"]:
            if highest["failing"]:
                missed = listed([f"{rate:.3g}" for rate in highest["failing"]])
                said.append(
                    f"{name} reaches {100 * highest['goal']:g} % at "
                    f"{highest['rate']:.3g} requests per second but not at {missed}: if memory is "
                    "scarce, attainment need not fall with the rate."
                )
    return said


def engine_start(data: dict[str, Any]) -> list[str]:
    """Return sentences about the effect of engine starts on the factors between policies."""
    policies = data["policies"]
    paying = [
        k for k, p in policies.items() if any(r["policy"] == k for r in data["engine_starts"])
    ]
    quick = [k for k in policies if k not in paying and not policies[k]["unlimited_memory"]]
    if not paying:
        return ["No policy of this study waits for an engine process to start."]
    who = listed(paying)
    alone = "alone pays" if len(paying) == 1 else "alone pay"
    start = data["study"]["engine_start_s"]
    said = [
        f"The paper reports tail TTFT up to {PAPER_FACTOR}x below that of autoscaling. Such a "
        f"factor depends on the engine start: {who} {alone} an engine start of {start:g} s at each "
        "start of an instance. The engines of the other policies wait on the devices."
    ]
    if not quick:
        return [*said, "This study has none of the other policies."]
    for policy in paying:
        rows = {r["engine_start_s"]: r for r in data["engine_starts"] if r["policy"] == policy}
        said += _owed(policy, start, [(other, _over(rows, other)) for other in quick])
    return said


def _over(rows: dict[float, Any], other: str) -> dict[float, Interval]:
    return {start: as_interval(row["ttft_p99_over"][other]) for start, row in rows.items()}


def _owed(slow: str, start: float, found: list[tuple[str, dict[float, Interval]]]) -> list[str]:
    """Return sentences about one policy that waits for engines.

    ``found``: for each other policy, the ratio of the tail of ``slow`` to its own, by start.
    """
    unknown = [other for other, over in found if not all(map(comparable, over.values()))]
    known = [(other, over) for other, over in found if other not in unknown]
    said = []
    if unknown:
        said.append(
            f"The P99 TTFT of {slow} has no ratio to that of {listed(unknown)}: in some seed one "
            "of the two is unbounded or zero."
        )
    if not known:
        return said
    (first, over), *others = known
    with_start = f"With {start:g} s, the P99 TTFT of {slow} is {times(over[start])} that of {first}"
    if 0.0 not in over or start == 0.0:
        said.append(with_start + ("." if start == 0.0 else "; equal starts were not run."))
        return said + [f"It is {times(each[start])} that of {other}." for other, each in others]
    said.append(f"{with_start}; with equal starts of 0 s it is {times(over[0.0])}.")
    said += [
        f"Relative to {other} these factors are {times(each[start])} and {times(each[0.0])}."
        for other, each in others
    ]
    # The other policies do not depend on the engine start, so that this factor is the same for all.
    factor = over[start].mean / over[0.0].mean
    if factor > 1.01:
        said.append(f"The engine start therefore accounts for a factor of {number(factor)}.")
    else:
        said.append("The engine start makes no difference here.")
    return said


def ratio_of(data: dict[str, Any], metric: str, ours: str, theirs: str) -> Interval:
    """Return the interval of a pair in either order: the ratio of ours over theirs, or for
    ``slo_miss_difference`` ours minus theirs. Raise ValueError if the pair is not in the study."""
    for pair in data["paired"]:
        found = (
            as_interval(pair[metric]) if {pair["policy"], pair["over"]} == {ours, theirs} else None
        )
        if found is None:
            continue
        if pair["policy"] == ours:
            return found
        if metric == "slo_miss_difference":
            return _turned(found, lambda value: 0.0 - value)
        return _turned(found, lambda value: 1 / value if value else math.inf)
    raise ValueError(f"the study has no pair of {ours} and {theirs}")


def _turned(each: Interval, turn: Any) -> Interval:
    if each.low is None or each.high is None:
        return Interval(turn(each.mean))
    return Interval(turn(each.mean), turn(each.high), turn(each.low))


def _ratio(data: dict[str, Any], ours: str, theirs: str) -> Interval:
    return ratio_of(data, "ttft_p99_ratio", ours, theirs)


def _tail(policy: dict[str, Any]) -> Interval:
    return as_interval(policy["metrics"]["ttft_p99"])


def _seeds(data: dict[str, Any]) -> str:
    n = data["study"]["seeds"]
    return f"{n} seeds" if n > 1 else "one seed"
