"""How long does it take to compute a residency plan, and how far from the best can it be?

    python bench/plan.py

The bench plans models of common sizes on nodes of eight devices of 80 GB, with needs that differ by
orders of magnitude. The loops are compiled before timing starts. The gap is measured to an upper
bound that no plan can exceed, so the gap to the best plan is smaller. At the end the bench
simulates a million requests, including their plans.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from time import perf_counter

import numpy as np

from bounds.residency import Catalogue, Plan, Problem, plan, replan
from lib.harness import Bench, seconds
from warmserve_rt.policy.curve import ValueCurve, value_curve
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.study.run import simulate
from warmserve_rt.sim.workload.catalogue import paper_models
from warmserve_rt.sim.workload.workloads import azure, power_law

NODE, CAPACITY, BANDWIDTH, TOKENS, BUDGET_S = 8, 80 * 10**9, 25e9, 512, 0.3
# Layers, MB of a layer, MB of embedding and head, KV KB per token, prefill ms of 0 and of 512
# tokens on one device, and the numbers of devices on which the model is served.
SHAPES = {
    "Llama-2-7B": (32, 404.8, 524, 512, 8, 41, (1, 2)),
    "Llama-2-13B": (40, 634.4, 655, 800, 17, 80, (1, 2)),
    "Llama-2-70B": (80, 1711.3, 1049, 320, 100, 420, (4, 8)),
    "Llama-3-8B": (32, 436.2, 2101, 128, 8, 44, (1, 2)),
    "Llama-3-70B": (80, 1711.3, 4203, 320, 100, 420, (4, 8)),
    "Qwen2.5-7B": (28, 466.1, 2180, 56, 8, 41, (1, 2)),
    "Qwen2.5-72B": (80, 1755.4, 4983, 320, 100, 430, (4, 8)),
    "Qwen3-8B": (36, 385.9, 2489, 144, 8, 44, (1, 2)),
    "Qwen3-32B": (64, 975.2, 3112, 256, 45, 195, (2, 4)),
}


def curves(objective: float | str) -> list[ValueCurve]:
    """Return the value curves of every shape and width."""
    made = []
    for name, (layers, each, ends, kv, none, some, widths) in SHAPES.items():
        for w in widths:
            inner, end = int(each * 1e6 / w), int(ends * 5e5 / w)
            profile = ModelProfile(
                name,
                w,
                (end, *(inner,) * layers, end),
                kv * 1024 // w,
                none / 1e3 / w,
                (some - none) / 1e3 / 512 / w,
                0.02,
            )
            made.append(
                value_curve(profile, BANDWIDTH, TOKENS, budget_s=BUDGET_S, objective=objective)
            )
    return made


def fleet(known: list[ValueCurve], devices: int, models: int, seed: int) -> Problem:
    """Return a problem with random models, one replica each."""
    random = np.random.default_rng(seed)
    picked = random.integers(len(known), size=models)
    catalogue = Catalogue.of(known[p] for p in picked)
    need = random.lognormal(-1, 1.5, models)
    return Problem(catalogue, np.arange(models), need, np.full(devices, CAPACITY), NODE)


def of_tightness(known: list[ValueCurve], devices: int, tightness: float, seed: int) -> Problem:
    """Return a problem whose models together need about 1/tightness times the available bytes."""
    each = [c.width * c.cumulative[c.knots[-1]] for c in known]
    picked = np.random.default_rng(seed).integers(len(known), size=100 * devices)
    shares = np.cumsum(np.array(each)[picked]) * tightness / (devices * CAPACITY)
    return fleet(known, devices, int(np.argmin(np.abs(shares - 1))) + 1, seed)


def timed(work: Callable[[], object], rounds: int) -> float:
    """Return the median time in ms."""
    return statistics.median(seconds(work) for _ in range(rounds)) * 1e3


def speed(bench: Bench, rounds: int) -> None:
    known = curves("mean")
    problems = {
        (devices, models): fleet(known, devices, models, 1)
        for devices, models in ((16, 40), (16, 100), (100, 1000), (316, 3160), (1000, 10000))
    }
    begin = perf_counter()
    found = {size: plan(problem) for size, problem in problems.items()}
    bench.row("first_plans_ms", (perf_counter() - begin) * 1e3, "ms")
    for (devices, models), problem in problems.items():
        taken = timed(lambda problem=problem: plan(problem), rounds)  # type: ignore[misc]
        name = f"plan_{devices}x{models}_ms"
        bound = {(16, 100): 5, (1000, 10000): 1000}.get((devices, models))
        if bound is None:
            bench.row(name, taken, "ms")
        else:
            bench.target(name, taken, "ms", "<=", bound)
    large = found[1000, 10000]
    begin = perf_counter()
    Catalogue.of(large.problem.catalogue.curves)
    bench.row("catalogue_10000_ms", (perf_counter() - begin) * 1e3, "ms")
    bench.row(
        "curves_40_ms", timed(lambda: curves("mean") + curves("mean"), rounds) * 40 / 36, "ms"
    )
    changed(bench, large, rounds)


def changed(bench: Bench, before: Plan, rounds: int) -> None:
    """Replan after the need of 1 % of the models has tripled or fallen to a third."""
    random = np.random.default_rng(2)
    need = before.problem.need.copy()
    picked = random.choice(len(need), len(need) // 100, replace=False)
    need[picked] *= random.choice([3, 1 / 3], len(picked))
    after = replan(before, need)
    bench.target("replan_1pct_ms", timed(lambda: replan(before, need), rounds), "ms", "<=", 50)
    moved = (before.group >= 0) & (after.group >= 0) & (before.group != after.group)
    held = before.problem.catalogue.cum[before.problem.catalogue.begin[:-1] + after.layers]
    new = np.where(before.group == after.group, 0, held)
    bench.row("replan_moved_share", float(moved.sum() / (before.group >= 0).sum()), "")
    width = before.problem.catalogue.width
    total = float((held * width).sum())
    bench.row("replan_bytes_moved_share", float((new * width)[moved].sum()) / total, "")
    bench.row("replan_gap", after.gap, "")


def drift(bench: Bench, plans: int) -> None:
    """Replan repeatedly while needs drift; each plan starts from the previous one.

    The sixteen devices hold half of the bytes that about 40 models need.
    """
    random = np.random.default_rng(3)
    found = plan(of_tightness(curves("mean"), 16, 0.5, 3))
    width, models = found.problem.catalogue.width, found.problem.catalogue
    taken, gap, new = [], [], []
    for _ in range(plans):
        need = found.problem.need * random.lognormal(0, 0.2, len(width))
        begin = perf_counter()
        after = replan(found, need)
        taken.append((perf_counter() - begin) * 1e3)
        gap.append(after.gap)
        stayed = np.where(after.group == found.group, np.minimum(after.layers, found.layers), 0)
        held = models.cum[models.begin[:-1] + after.layers]
        new.append(float(((held - models.cum[models.begin[:-1] + stayed]) * width).sum()))
        found = after
    bench.row("drift_models", len(width), "")
    bench.row("drift_replan_ms_p50", statistics.median(taken), "ms")
    bench.row("drift_replan_ms_max", max(taken), "ms")
    bench.row("drift_gap_median", statistics.median(gap), "")
    bench.row("drift_gap_max", max(gap), "")
    bench.row("drift_loaded_share", statistics.mean(new) / (16 * CAPACITY), "a plan")


def gaps(bench: Bench, seeds: int) -> None:
    grid = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
    for objective in ("mean", 0.5, "slo"):
        known = curves(objective)
        for devices in (16, 128):
            found = {
                (tightness, seed): plan(of_tightness(known, devices, tightness, seed)).gap
                for tightness, seed in itertools.product(grid, range(seeds))
            }
            name = f"gap_{objective}_{devices}"
            bench.row(f"{name}_median", statistics.median(found.values()), "")
            bench.row(f"{name}_max", max(found.values()), "")
            bench.row(f"{name}_max_at", max(found, key=lambda key: found[key])[0], "of wanted")
        if objective == "mean":
            most = max(bench.results[f"gap_mean_{devices}_max"] for devices in (16, 128))
            bench.target("plan_gap_max", most, "", "<=", 0.02)


def million(bench: Bench) -> None:
    """Simulate a million requests on 16 GPUs under this project's own policy, in one process."""
    workload = azure(paper_models(), 20.0, 50_000.0, seed=1, service="conv")
    simulate("scheduler", power_law(paper_models(), 1.0, 60.0, seed=1), Hardware())
    taken = seconds(lambda: simulate("scheduler", workload, Hardware()))
    bench.row("sim_requests", len(workload.time), "")
    bench.target("sim_1m_requests_s", taken * 1e6 / len(workload.time), "s", "<=", 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each timed operation")
    parser.add_argument("--seeds", type=int, default=10, help="seeds of each tightness")
    bench = Bench.start("plan", parser)
    print("time", flush=True)
    speed(bench, bench.args.rounds)
    print("drifting needs", flush=True)
    drift(bench, 200)
    print("gap to the linear bound", flush=True)
    gaps(bench, bench.args.seeds)
    million(bench)
    bench.finish()


if __name__ == "__main__":
    main()
