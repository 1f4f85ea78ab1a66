"""Compares policies on the same GPUs: times to first token, SLO misses, sustained rates.

python bench/policies.py [--full] [--only claim,cases,rates,ablations,scaling] [--json FILE]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from bounds.static import late_at_least
from lib.fleets import Case, Run, geomean, jackknife, mean_of, perform_all, workload_of
from lib.harness import Bench, Interval
from parts.policies.study import Study, quick, whole
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.study.metrics import Slo

OURS, THEIRS = "scheduler", "warmserve"
STILL_GB = (1152, 1000, 900, 800)  # all memory, and what working instances leave of it
LEAST_SEEDS = 3  # for an interval: with two seeds it has 12.7 standard errors on each side


def over(seeds: Sequence[int], of: Callable[[Sequence[int]], float]) -> tuple[float, Interval]:
    """Return a ratio over all seeds, and its interval if there are enough seeds."""
    return of(seeds), jackknife(of, seeds) if len(seeds) >= LEAST_SEEDS else None


def claim(bench: Bench, study: Study) -> None:
    """Compare autoscaling with WarmServe by P99 on the paper's four models: the paper's claim."""
    cases, seeds = study.claimed, study.seeds
    runs = [Run(case, THEIRS, seed) for case in cases for seed in seeds]
    runs += [
        Run(case, "autoscaling", seed, engine_start_s=start)
        for case in cases
        for seed in seeds
        for start in study.starts_s
    ]
    runs += [Run(case, "warmserve-polls", seed) for case in cases for seed in seeds]
    found = perform_all(runs)

    def gain(policy: str, start: float = Run.engine_start_s) -> tuple[float, Interval]:
        """Return the geometric mean over cases of this policy's P99 relative to WarmServe's."""

        def of(some: Sequence[int]) -> float:
            return geomean(
                mean_of(found, Run(case, policy, 0, engine_start_s=start), some, "ttft_p99")
                / mean_of(found, Run(case, THEIRS, 0), some, "ttft_p99")
                for case in cases
            )

        return over(seeds, of)

    print("P99 of autoscaling over WarmServe, by engine start time (only autoscaling pays it):")
    for start in study.starts_s:
        if start != 5.0:
            value, within = gain("autoscaling", start)
            bench.row(f"paper_p99_gain_start{start:g}", value, "x", within)
    value, within = gain("autoscaling", 5.0)
    bench.target("paper_p99_gain_start5", value, "x", ">=", 20, within)
    value, within = gain("warmserve-polls")
    bench.row("warmserve_polls_p99", value, "x of event-driven", within)


def cases(bench: Bench, study: Study) -> None:
    """Compare ours with WarmServe if memory leaves head-room, and with the bounds h0 and h1."""
    seeds = study.seeds
    every = [*study.every, *(replace(case, bandwidth=52.0) for case in study.every)]
    runs = [
        Run(case, policy, seed)
        for case in every
        for policy in (OURS, THEIRS, "h0", "h1")
        for seed in seeds
    ]
    runs += [Run(case, OURS, seed, multipath=4) for case in study.every for seed in seeds]
    found = perform_all(runs)
    requests = min(summary.requests for summary in found.values())
    bench.row("requests_per_run_min", requests, "")
    # A share of misses of 0 counts as half a request of a run, so that ratios are finite.
    least = 0.5 / requests

    def mean(
        case: Case, policy: str, what: str, some: Sequence[int] = seeds, multipath: int = 1
    ) -> float:
        value = mean_of(found, Run(case, policy, 0, multipath), some, what)
        return max(value, least) if what == "slo_miss" else value

    head = []
    print(
        f"  {'case':<20} GB/s   misses %: ours WarmServe h0    P99 s: ours WarmServe h1 h0   mean s"
    )
    for case in every:
        missed = [
            100 * mean_of(found, Run(case, policy, 0), seeds, "slo_miss")
            for policy in (OURS, THEIRS, "h0")
        ]
        tails = [mean(case, policy, "ttft_p99") for policy in (OURS, THEIRS, "h1", "h0")]
        if tails[1] > 1.2 * tails[3]:
            head.append(case)
        print(
            f"  {case.name:<20} {case.bandwidth:>4g}   "
            + " ".join(f"{each:>6.2f}" for each in missed)
            + "   "
            + " ".join(f"{each:>6.3f}" for each in tails)
            + f"   {mean(case, OURS, 'ttft_mean'):.3f} {mean(case, THEIRS, 'ttft_mean'):.3f}"
            + ("" if case in head else " (no head-room)"),
            flush=True,
        )
    bench.row("headroom_cases", len(head), f"of {len(every)}")
    at_25 = [case for case in head if case.bandwidth == 25.0]
    at_52 = [case for case in head if case.bandwidth == 52.0]

    def target(
        name: str,
        reduce: Callable[[Iterable[float]], float],
        some_cases: Sequence[Case],
        what: str,
        op: str,
        bound: float,
        *,
        above: str = THEIRS,
        below: str = OURS,
        multipath: int = 1,
    ) -> None:
        """Record ``reduce`` over the ratios of ``above`` to ``below`` (run with ``multipath``); nan
        if there are no cases."""

        def of(some: Sequence[int]) -> float:
            ratios = [
                mean(case, above, what, some) / mean(case, below, what, some, multipath)
                for case in some_cases
            ]
            return reduce(ratios) if ratios else math.nan

        value, within = over(seeds, of)
        bench.target(name, value, "x", op, bound, within)

    target("misses_gain_min", min, head, "slo_miss", ">=", 1.4)
    target("misses_gain_geomean", geomean, at_25, "slo_miss", ">=", 2.0)
    target("misses_gain_52_geomean", geomean, at_52, "slo_miss", ">=", 5)
    target("p99_gain_min", min, head, "ttft_p99", ">=", 1.18)
    target("p99_gain_geomean", geomean, head, "ttft_p99", ">=", 1.45)
    target("p99_gain_multipath_geomean", geomean, at_25, "ttft_p99", ">=", 2.5, multipath=4)
    target("worst_ratio_mean", max, every, "ttft_mean", "<=", 1.02, above=OURS, below=THEIRS)
    target("p99_vs_h1_max", max, every, "ttft_p99", "<=", 1.4, above=OURS, below="h1")
    target("p99_vs_h1_geomean", geomean, every, "ttft_p99", "<=", 1.12, above=OURS, below="h1")


def rates(bench: Bench, study: Study) -> None:
    """Find the highest rate of a grid at which 99 % of requests meet their SLO."""
    policies, grids, seeds = (OURS, THEIRS, "h0"), study.grids, study.seeds
    runs = [Run(case, policy, 0) for case in grids for policy in policies]
    for case in study.shared():
        runs += [Run(case, OURS, 0, interference=x) for x in study.interference]
        runs += [Run(case, "sharing", 0, interference=x) for x in study.interference]
        runs.append(Run(case, "fixed-shares", 0))
    found = perform_all(
        replace(run, case=run.case.at(rate), seed=seed)
        for run in runs
        for rate in grids[run.case]
        for seed in seeds
    )

    def highest(run: Run, goal: float = 0.99) -> float:
        """Return the highest sustained rate of the grid, or 0."""
        held = [
            rate
            for rate in grids[run.case]
            if 1 - mean_of(found, replace(run, case=run.case.at(rate)), seeds, "slo_miss") >= goal
        ]
        return max(held, default=0.0)

    def ratio(ours: Run, theirs: Run) -> float:
        """Return the ratio; a run that does not sustain the lowest rate counts with half of it."""
        floor = min(grids[ours.case]) / 2
        return max(highest(ours), floor) / max(highest(theirs), floor)

    gains: dict[str, float] = {}
    elsewhere: dict[str, float] = {}
    for case in grids:
        at = {p: highest(Run(case, p, 0)) for p in policies}
        low = {p: highest(Run(case, p, 0), 0.97) for p in policies}
        print(
            f"  {case.name:<20} highest rate at 99 % (97 %): "
            + ", ".join(f"{p} {at[p]:g} ({low[p]:g})" for p in policies)
        )
        some = gains if at["h0"] >= 1.5 * at[THEIRS] else elsewhere
        some[case.name] = ratio(Run(case, OURS, 0), Run(case, THEIRS, 0))
    bench.target("rate_gain_min", min(gains.values(), default=math.nan), "x", ">=", 1.3)
    bench.target("rate_ratio_elsewhere_min", min(elsewhere.values(), default=1.0), "x", ">=", 0.97)
    for case, name in zip(study.shared(), ("24", "servegen_periodic"), strict=True):
        for x in study.interference:
            gain = ratio(
                Run(case, OURS, 0, interference=x), Run(case, "sharing", 0, interference=x)
            )
            if (name, x) == ("24", 0.35):
                bench.target("rate_vs_sharing_24", gain, "x", ">=", 1.3)
            else:
                bench.row(f"rate_vs_sharing_{name}_{x:g}", gain, "x")
        gain = ratio(Run(case, OURS, 0), Run(case, "fixed-shares", 0))
        if name == "24":
            bench.target("rate_vs_fixed_shares_24", gain, "x", ">=", 2.5)
        else:
            bench.row(f"rate_vs_fixed_shares_{name}", gain, "x")


def ablations(bench: Bench, study: Study) -> None:
    """Measure misses of our policy's ablations: with exclusive devices, with unlimited memory, with
    four links, and with neighbours that do not slow each other or slow each other by a factor of
    two; and a lower bound on late starts of the 40 models for any static choice of resident layers
    in a given number of GB."""
    ways: dict[str, dict[str, Any]] = {
        "": {},
        "_exclusive": {"options": (("share", False),)},
        "_memory": {"memory": 1e15},
        "_multipath": {"multipath": 4},
        "_interference_0": {"interference": 0.0},
        "_interference_1": {"interference": 1.0},
    }
    seeds = study.seeds
    every = [replace(x, bandwidth=bandwidth) for x in study.scarce for bandwidth in (25.0, 52.0)]
    runs = [
        Run(case, OURS, seed, **more) for case in every for more in ways.values() for seed in seeds
    ]
    found = perform_all(runs)
    for case in every:
        for way, more in ways.items():
            missed = mean_of(found, Run(case, OURS, 0, **more), seeds, "slo_miss")
            bench.row(f"{case.name}_{case.bandwidth:g}_misses{way}", 100 * missed, "%")
    for case in [case for case in every if case.models == "40"]:
        for memory in STILL_GB:
            each = memory * 1e9 / Hardware.devices
            hardware = Hardware(memory=each, bandwidth=case.bandwidth * 1e9)
            late = fmean(late_at_least(workload_of(case, seed), hardware, Slo()) for seed in seeds)
            bench.row(f"{case.name}_{case.bandwidth:g}_late_still_{memory}", 100 * late, "%")


def scaling(bench: Bench, study: Study) -> None:
    """Measure how the paper's claim depends on the number of GPUs and on when instances start:
    autoscaling with an engine start of 5 s, WarmServe and h0, on 16 and on 32 GPUs, scaled up as in
    the prototype or at half of capacity averaged over one second."""
    sooner = (
        ("scale_up_threshold", 0.5),
        ("scale_down_threshold", 0.3),
        ("load_window_s", 1.0),
    )
    ways: dict[str, dict[str, Any]] = {
        "": {},
        "_32": {"devices": 32},
        "_sooner": {"options": sooner},
        "_32_sooner": {"devices": 32, "options": sooner},
    }
    policies, seeds = ("autoscaling", THEIRS, "h0"), study.seeds
    found = perform_all(
        Run(case, policy, seed, **more)
        for case in study.claimed
        for policy in policies
        for more in ways.values()
        for seed in seeds
    )
    for way, more in ways.items():
        for case in study.claimed:
            tails = [
                mean_of(found, Run(case, policy, 0, **more), seeds, "ttft_p99")
                for policy in policies
            ]
            for policy, tail in zip(policies, tails, strict=True):
                bench.row(f"{case.name}_{policy}_p99{way}", tail, "s")
            bench.row(f"{case.name}_gain{way}", tails[0] / tails[1], "x")


PARTS = {
    "claim": claim,
    "cases": cases,
    "rates": rates,
    "ablations": ablations,
    "scaling": scaling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="five seeds instead of two")
    parser.add_argument(
        "--only", default="claim,cases,rates", help=f"comma-separated parts: {', '.join(PARTS)}"
    )
    bench = Bench.start("policies", parser)
    seeds = range(1, 6) if bench.args.full else range(1, 3)
    study = bench.size(whole(seeds), quick())
    if len(study.seeds) < LEAST_SEEDS:
        print(f"{len(study.seeds)} seeds: ratios have no intervals; use --full for intervals")
    else:
        print("ratios in claim and cases: [95 % interval over the paired seeds]")
    for part in bench.args.only.split(","):
        print(f"{part}: {PARTS[part].__doc__}", flush=True)
        PARTS[part](bench, study)
    bench.finish()


if __name__ == "__main__":
    main()
