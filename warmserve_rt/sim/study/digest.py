"""Turn a study's result into plain data for summary.json and the report."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import Any

import numpy as np

from warmserve_rt._text import plain
from warmserve_rt.sim.controllers.policies import POLICIES

from .intervals import Interval, difference, highest_rate, interval, ratio
from .metrics import Floats, RunSummary
from .runner import Outcome, Result
from .study import GOALS, Study

METRICS = tuple(field.name for field in fields(RunSummary))
RATIOS = ("ttft_mean", "ttft_p99")
CDF_POINTS = 240


def digest(result: Result) -> dict[str, Any]:
    """Return the result as data that JSON can hold, except for infinite and undefined numbers (see
    ``to_json``).

    The same study always gives the same data, because it has no times of day and no timings.
    """
    study = result.study
    described = {
        policy: [o for o in result.outcomes if o.run.policy == policy and o.run.detailed]
        for policy in study.policies
    }
    return {
        "format": "warmserve_rt simulation 1",
        "study": _arguments(study),
        "workload": {
            "name": plain(result.workload.name),
            "minutes": result.workload.duration / 60,
            "requests_of_first_seed": len(result.workload.time),
            "models": [model.name for model in result.workload.models],
            "nbytes": sum(model.nbytes * model.width for model in result.workload.models),
        },
        "policies": {
            policy: _policy(result, policy, outcomes) for policy, outcomes in described.items()
        },
        "paired": [
            _paired(ours, theirs, described[ours], described[theirs])
            for theirs, ours in combinations(study.policies, 2)
        ],
        "engine_starts": _engine_starts(result, described),
        "versions": {
            "warmserve_rt": _version(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def to_json(data: dict[str, Any]) -> str:
    """Return the data as JSON. An infinite number becomes the string "inf", NaN becomes null."""
    return json.dumps(_plain(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _arguments(study: Study) -> dict[str, Any]:
    arguments = asdict(study)
    # The folder of a file is left out: it tells about the machine, not about the study.
    arguments["workload"] = plain(
        study.workload.rsplit("/", 1)[-1] if study.from_file else study.workload
    )
    return arguments


def _policy(result: Result, policy: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    study = result.study
    known = POLICIES[policy]
    rates = sorted({study.rate, *study.rates})
    attainment = [
        interval([1.0 - s.slo_miss for s in _summaries(result, policy, rate)]) for rate in rates
    ]
    return {
        "title": known.title,
        "engine_start_s": study.engine_start_s if known.engine_start else 0.0,
        "unlimited_memory": known.unlimited_memory,
        "metrics": {
            name: {
                **asdict(interval(_values(outcomes, name))),
                "by_seed": _values(outcomes, name),
            }
            for name in METRICS
        },
        "attainment": [
            {"rate": rate, **asdict(each)} for rate, each in zip(rates, attainment, strict=True)
        ],
        "highest_rate": [
            asdict(highest_rate(rates, [each.mean for each in attainment], goal)) for goal in GOALS
        ],
        "ttft_cdf": _distribution([o.ttft for o in outcomes if o.ttft is not None]),
    }


def _summaries(result: Result, policy: str, rate: float) -> list[RunSummary]:
    """Return the summaries of one policy at one rate, by seed."""
    start = result.study.engine_start_s
    return [
        o.summary
        for o in result.outcomes
        if (o.run.policy, o.run.rate, o.run.engine_start_s) == (policy, rate, start)
    ]


def _values(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    return [float(getattr(outcome.summary, metric)) for outcome in outcomes]


def _paired(
    ours: str, theirs: str, of_ours: Sequence[Outcome], of_theirs: Sequence[Outcome]
) -> dict[str, Any]:
    def values(metric: str) -> tuple[list[float], list[float]]:
        return _values(of_ours, metric), _values(of_theirs, metric)

    return {
        "policy": ours,
        "over": theirs,
        **{f"{metric}_ratio": asdict(ratio(*values(metric))) for metric in RATIOS},
        "slo_miss_difference": asdict(difference(*values("slo_miss"))),
    }


def _engine_starts(result: Result, described: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """Return the tail TTFT of each policy that waits for an engine, by the seconds of the engine
    start, and its ratio to that of each policy that does not wait."""
    study, rows = result.study, []
    quick = [p for p in study.policies if not POLICIES[p].engine_start]
    for policy in study.policies:
        if not POLICIES[policy].engine_start:
            continue
        for start in sorted({study.engine_start_s, *study.engine_starts_s}):
            outcomes = [
                o
                for o in result.outcomes
                if (o.run.policy, o.run.rate, o.run.engine_start_s) == (policy, study.rate, start)
            ]
            slow = _values(outcomes, "ttft_p99")
            rows.append(
                {
                    "policy": policy,
                    "engine_start_s": start,
                    "ttft_p99": asdict(interval(slow)),
                    "slo_miss": asdict(interval(_values(outcomes, "slo_miss"))),
                    "ttft_p99_over": {
                        other: asdict(ratio(slow, _values(described[other], "ttft_p99")))
                        for other in quick
                    },
                }
            )
    return rows


def _distribution(times: Sequence[Floats]) -> list[tuple[float, float]]:
    """Return the share of requests, over all seeds, at or below times; denser at the tail."""
    ascending = np.sort(np.concatenate(times))
    n = len(ascending)
    depth = np.geomspace(1.0, 1.0 / n, CDF_POINTS // 2)
    ranks = np.concatenate([np.linspace(0, 1, CDF_POINTS // 2), 1.0 - depth])
    rows = np.unique(np.clip(np.rint(ranks * n).astype(np.int64), 1, n))
    # The share of equal times is that of the last of them.
    shares = np.searchsorted(ascending, ascending[rows - 1], side="right") / n
    points = zip(ascending[rows - 1].tolist(), shares.tolist(), strict=True)
    return [(time, share) for time, share in dict(points).items() if math.isfinite(time)]


def _version() -> str:
    try:
        return version("warmserve_rt")
    except PackageNotFoundError:
        return "unknown"


def as_interval(data: dict[str, Any]) -> Interval:
    """Return an interval that ``digest`` turned into data."""
    return Interval(data["mean"], data["low"], data["high"])
