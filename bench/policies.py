"""What does a policy make of the same GPUs? Times to first token, SLO misses, rates that are held.

python bench/policies.py [--full] [--only claim,cases,rates,ablations] [--json FILE]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from _fleets import Case, Run, geomean, mean_of, perform_all
from _harness import Bench

OURS, THEIRS = "scheduler", "warmserve"
PAPER = [Case(f"paper-{rate}", "azure-conv", "paper", rate, 900) for rate in (15, 20, 25)]
SCARCE = [
    Case("mixed-24", "azure", "24", 0.6, 1800),
    Case("mixed-40", "azure", "40", 0.6, 1800),
    Case("servegen-periodic", "servegen-periodic", "24", 0.8, 1800),
    Case("servegen-middle", "servegen-middle", "24", 0.8, 1800),
    Case("servegen-aperiodic", "servegen-aperiodic", "24", 0.8, 1800),
]
GRIDS = [
    (Case("paper", "azure-conv", "paper", 0, 600), (10, 15, 20, 25, 30)),
    (Case("mixed-24", "azure", "24", 0, 900), (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 9.6, 12.8, 16)),
    (Case("mixed-40", "azure", "40", 0, 900), (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)),
    (Case("servegen-periodic", "servegen-periodic", "24", 0, 900), (0.4, 0.8, 1.2, 1.6, 2.4)),
    (Case("servegen-middle", "servegen-middle", "24", 0, 900), (0.4, 0.8, 1.6, 2.4, 3.2)),
    (Case("servegen-aperiodic", "servegen-aperiodic", "24", 0, 900), (0.4, 0.8, 1.6, 2.4, 3.2)),
]
STARTS_S = (0.0, 1.0, 2.0, 5.0, 10.0)
INTERFERENCE = (0.0, 0.35, 1.0)


def claim(bench: Bench, seeds: range) -> None:
    """The paper's: the tail of autoscaling over that of WarmServe, on its four models."""
    cases = PAPER[1:]
    runs = [Run(case, THEIRS, seed) for case in cases for seed in seeds]
    runs += [
        Run(case, "autoscaling", seed, engine_start_s=start)
        for case in cases
        for seed in seeds
        for start in STARTS_S
    ]
    runs += [Run(case, "warmserve-polls", seed) for case in cases for seed in seeds]
    found = perform_all(runs)

    def p99(run: Run) -> float:
        return mean_of(found, run, seeds, "ttft_p99")

    gains = {
        start: geomean(
            p99(Run(case, "autoscaling", 0, engine_start_s=start)) / p99(Run(case, THEIRS, 0))
            for case in cases
        )
        for start in STARTS_S
    }
    print("P99 of autoscaling over WarmServe, by the engine start that autoscaling alone pays:")
    for start, gain in gains.items():
        if start != 5.0:
            bench.row(f"paper_p99_gain_start{start:g}", gain, "x")
    bench.target("paper_p99_gain_start5", gains[5.0], "x", ">=", 20)
    polls = geomean(
        p99(Run(case, "warmserve-polls", 0)) / p99(Run(case, THEIRS, 0)) for case in cases
    )
    bench.row("warmserve_polls_p99", polls, "x of event-driven")


def cases(bench: Bench, seeds: range) -> None:
    """Ours over WarmServe, where memory leaves head-room, and beside the bounds h0 and h1."""
    fast = [replace(case, bandwidth=52.0) for case in (*PAPER, *SCARCE)]
    every = [*PAPER, *SCARCE, *fast]
    runs = [
        Run(case, policy, seed)
        for case in every
        for policy in (OURS, THEIRS, "h0", "h1")
        for seed in seeds
    ]
    runs += [Run(case, OURS, seed, multipath=4) for case in (*PAPER, *SCARCE) for seed in seeds]
    found = perform_all(runs)
    requests = min(summary.requests for summary in found.values())
    bench.row("requests_per_run_min", requests, "")
    misses, tails, means, known, spread = {}, {}, {}, {}, {}
    print(
        f"  {'case':<20} GB/s   misses %: ours WarmServe h0    P99 s: ours WarmServe h1 h0   mean s"
    )
    for case in every:

        def of(policy: str, what: str, case: Case = case, **more: int) -> float:
            return mean_of(found, Run(case, policy, 0, **more), seeds, what)

        ours, theirs = of(OURS, "ttft_p99"), of(THEIRS, "ttft_p99")
        means[case] = of(OURS, "ttft_mean") / of(THEIRS, "ttft_mean")
        known[case] = ours / of("h1", "ttft_p99")
        # Half a request in a run is the least share of misses that a run could show.
        least = 0.5 / requests
        if theirs > 1.2 * of("h0", "ttft_p99"):
            misses[case] = max(of(THEIRS, "slo_miss"), least) / max(of(OURS, "slo_miss"), least)
            tails[case] = theirs / ours
            if case.bandwidth == 25.0:
                spread[case] = theirs / of(OURS, "ttft_p99", multipath=4)
        head = "" if case in tails else " (no head-room)"
        print(
            f"  {case.name:<20} {case.bandwidth:>4g}   "
            f"{100 * of(OURS, 'slo_miss'):>6.2f} {100 * of(THEIRS, 'slo_miss'):>6.2f} "
            f"{100 * of('h0', 'slo_miss'):>6.2f}   {ours:>6.3f} {theirs:>6.3f} "
            f"{of('h1', 'ttft_p99'):>6.3f} {of('h0', 'ttft_p99'):>6.3f}   "
            f"{of(OURS, 'ttft_mean'):.3f} {of(THEIRS, 'ttft_mean'):.3f}{head}",
            flush=True,
        )
    slow = [case for case in misses if case.bandwidth == 25.0]
    fast = [case for case in misses if case.bandwidth == 52.0]
    bench.row("headroom_cases", len(misses), f"of {len(every)}")
    bench.target("misses_gain_min", min(misses.values()), "x", ">=", 1.4)
    bench.target("misses_gain_geomean", geomean(misses[c] for c in slow), "x", ">=", 2.0)
    bench.target("misses_gain_52_geomean", geomean(misses[c] for c in fast), "x", ">=", 5)
    bench.target("p99_gain_min", min(tails.values()), "x", ">=", 1.18)
    bench.target("p99_gain_geomean", geomean(tails.values()), "x", ">=", 1.45)
    bench.target("p99_gain_multipath_geomean", geomean(spread.values()), "x", ">=", 2.5)
    bench.target("worst_ratio_mean", max(means.values()), "x", "<=", 1.02)
    bench.target("p99_vs_h1_max", max(known.values()), "x", "<=", 1.4)
    bench.target("p99_vs_h1_geomean", geomean(known.values()), "x", "<=", 1.12)


def rates(bench: Bench, seeds: range) -> None:
    """The highest rate of a grid at which 99 % of requests are in time."""
    policies = (OURS, THEIRS, "h0")
    shared = [
        Run(GRIDS[1][0], policy, 0, interference=x)
        for x in INTERFERENCE
        for policy in ("sharing", OURS)
    ]
    shared.append(Run(GRIDS[1][0], "fixed-shares", 0))
    runs = [
        replace(run, case=case.at(rate), seed=seed)
        for case, grid in GRIDS
        for rate in grid
        for run in (
            *(Run(case, policy, 0) for policy in policies),
            *(shared if case.name in ("mixed-24", "servegen-periodic") else ()),
        )
        for seed in seeds
    ]
    found = perform_all(runs)

    def highest(case: Case, grid: tuple[float, ...], run: Run, goal: float = 0.99) -> float:
        """0 where none is held."""
        held = [
            rate
            for rate in grid
            if 1 - mean_of(found, replace(run, case=case.at(rate)), seeds, "slo_miss") >= goal
        ]
        return max(held, default=0.0)

    gains, elsewhere = {}, {}
    for case, grid in GRIDS:
        at = {p: highest(case, grid, Run(case, p, 0)) for p in policies}
        low = {p: highest(case, grid, Run(case, p, 0), 0.97) for p in policies}
        print(
            f"  {case.name:<20} highest rate at 99 % (97 %): "
            + ", ".join(f"{p} {at[p]:g} ({low[p]:g})" for p in policies)
        )
        floor = min(grid) / 2  # where not even the lowest rate of the grid is held
        ratio = max(at[OURS], floor) / max(at[THEIRS], floor)
        (gains if at["h0"] >= 1.5 * at[THEIRS] else elsewhere)[case.name] = ratio
    bench.target("rate_gain_min", min(gains.values(), default=float("nan")), "x", ">=", 1.3)
    bench.target("rate_ratio_elsewhere_min", min(elsewhere.values(), default=1.0), "x", ">=", 0.97)
    for index, name in ((1, "24"), (3, "servegen_periodic")):
        case, grid = GRIDS[index]
        ours = max(highest(case, grid, Run(case, OURS, 0)), min(grid) / 2)
        by = [ours / max(highest(case, grid, run), min(grid) / 2) for run in shared]
        for interference, ratio in zip(INTERFERENCE, by, strict=False):
            if name == "24" and interference == 0.35:
                bench.target("rate_vs_sharing_24", ratio, "x", ">=", 1.3)
            else:
                bench.row(f"rate_vs_sharing_{name}_{interference:g}", ratio, "x")
        if name == "24":
            bench.target("rate_vs_fixed_shares_24", by[-1], "x", ">=", 2.5)
        else:
            bench.row(f"rate_vs_fixed_shares_{name}", by[-1], "x")


def ablations(bench: Bench, seeds: range) -> None:
    """What limits ours where memory is scarce: misses without limits of memory or of links."""
    ways = {"": {}, "_memory": {"memory": 1e15}, "_multipath": {"multipath": 4}}
    every = [replace(case, bandwidth=bandwidth) for case in SCARCE for bandwidth in (25.0, 52.0)]
    runs = [
        Run(case, OURS, seed, **more) for case in every for more in ways.values() for seed in seeds
    ]
    found = perform_all(runs)
    for case in every:
        for way, more in ways.items():
            missed = mean_of(found, Run(case, OURS, 0, **more), seeds, "slo_miss")
            bench.row(f"{case.name}_{case.bandwidth:g}_misses{way}", 100 * missed, "%")


PARTS = {"claim": claim, "cases": cases, "rates": rates, "ablations": ablations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="five seeds, not two")
    parser.add_argument(
        "--only", default="claim,cases,rates", help=f"of {', '.join(PARTS)}, with commas"
    )
    bench = Bench.start("policies", parser)
    seeds = range(1, 6) if bench.args.full else range(1, 3)
    for part in bench.args.only.split(","):
        print(f"{part}: {PARTS[part].__doc__}", flush=True)
        PARTS[part](bench, seeds)
    bench.finish()


if __name__ == "__main__":
    main()
