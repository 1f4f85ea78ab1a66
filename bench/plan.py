"""How long does a plan of the scheduler take, and how far from the best can its result be?

    python bench/plan.py

The bench plans models of common sizes on nodes of eight devices of 80 GB, with needs that differ by
orders of magnitude. A plan is one call of ``improve`` with at most 16 exchanges, as the scheduler
makes it. The loops are compiled before timing starts. The gap is measured to the linear bound of
``bounds/residency.py``, which no plan can exceed, so the gap to the best plan is smaller. At the
end the bench simulates a million requests, including their plans.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from bounds.residency import Catalogue, Problem, plan
from lib.harness import Bench, seconds
from warmserve_rt.policy._arrays import F64
from warmserve_rt.policy.curve import ValueCurve, value_curve
from warmserve_rt.policy.improve import Copy, Curves, improve
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.study.run import simulate
from warmserve_rt.sim.workload.catalogue import paper_models
from warmserve_rt.sim.workload.workloads import azure, power_law

MARGIN, MOVES = 0.5, 16  # the scheduler's own
SIZES = ((16, 100), (100, 1000), (1000, 10000))  # devices, models
SETTLED = 400  # plans after which a fleet counts as settled, if each still finds an exchange
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


@dataclass
class Fleet:
    """Random models, one replica of each to be held, and the copies that devices hold."""

    curves: list[ValueCurve]
    need: F64
    devices: int

    def __post_init__(self) -> None:
        self.arrays = Curves(self.curves)
        self.available = np.ones(self.devices)

    def free(self, copies: Sequence[Copy]) -> F64:
        """Return the bytes beside these copies on each device."""
        free = np.full(self.devices, float(CAPACITY))
        for copy in copies:
            width = self.curves[copy.model].width
            free[copy.first : copy.first + width] -= self.arrays.nbytes(copy.model, copy.layers)
        return free

    def plan(self, copies: Sequence[Copy], need: F64 | None = None) -> Callable[[], list[Copy]]:
        """Return a plan of the scheduler to run, with its input made already."""
        need, free = self.need if need is None else need, self.free(copies)
        return lambda: improve(
            self.arrays,
            need,
            copies,
            free.copy(),
            self.available,
            NODE,
            margin=MARGIN,
            moves=MOVES,
        )

    def settle(self, copies: Sequence[Copy]) -> list[Copy]:
        """Return the copies after plans that go on until one finds no exchange."""
        for _ in range(SETTLED):
            before, copies = copies, self.plan(copies)()
            if places(before) == places(copies):
                break
        return list(copies)

    def problem(self) -> Problem:
        """Return the same models and devices as a problem of the linear bound."""
        models = len(self.curves)
        capacity = np.full(self.devices, CAPACITY)
        return Problem(Catalogue.of(self.curves), np.arange(models), self.need, capacity, NODE)

    def from_bound(self) -> list[Copy]:
        """Return the copies of the planner that makes the bound: near the best, and made fast."""
        found = plan(self.problem())
        held = np.flatnonzero(found.group >= 0).tolist()
        return [Copy(model, int(found.group[model]), int(found.layers[model])) for model in held]

    def gap(self, copies: Sequence[Copy]) -> float:
        """Return by what share of the linear bound the value of these copies is below it."""
        value = sum(
            float(self.need[copy.model] * self.curves[copy.model].value[copy.layers]) * copy.use
            for copy in copies
        )
        bound = plan(self.problem(), tries=1).bound
        return 1 - value / bound


def places(copies: Sequence[Copy]) -> set[tuple[int, int, int]]:
    return {(copy.model, copy.first, copy.layers) for copy in copies}


def fleet(known: list[ValueCurve], devices: int, models: int, seed: int) -> Fleet:
    """Return a fleet with random models."""
    random = np.random.default_rng(seed)
    picked = random.integers(len(known), size=models)
    return Fleet([known[p] for p in picked], random.lognormal(-1, 1.5, models), devices)


def of_tightness(known: list[ValueCurve], devices: int, tightness: float, seed: int) -> Fleet:
    """Return a fleet whose models together need about 1/tightness times the available bytes."""
    each = [c.width * c.cumulative[c.knots[-1]] for c in known]
    picked = np.random.default_rng(seed).integers(len(known), size=100 * devices)
    shares = np.cumsum(np.array(each)[picked]) * tightness / (devices * CAPACITY)
    return fleet(known, devices, int(np.argmin(np.abs(shares - 1))) + 1, seed)


def timed(work: Callable[[], object], rounds: int) -> float:
    """Return the median time in ms."""
    return statistics.median(seconds(work) for _ in range(rounds)) * 1e3


def speed(bench: Bench, rounds: int) -> None:
    """Time a plan on empty devices, on a settled fleet, and on one whose needs have changed.

    For 1 % of the models, but at least one, the need has tripled or fallen to a third.
    """
    known = curves("mean")
    begin = perf_counter()
    fleet(known, 16, 40, 1).plan([])()
    bench.row("first_plan_ms", (perf_counter() - begin) * 1e3, "ms")
    for devices, models in SIZES:
        name = f"improve_{devices}x{models}"
        bound = {(16, 100): 5, (1000, 10000): 1000}.get((devices, models))
        devices, models = bench.size((devices, models), (8, 20))
        some = fleet(known, devices, models, 1)
        settled = some.settle(some.from_bound())
        random = np.random.default_rng(2)
        need = some.need.copy()
        picked = random.choice(models, max(models // 100, 1), replace=False)
        need[picked] *= random.choice([3, 1 / 3], len(picked))
        taken = {
            "empty": timed(some.plan([]), rounds),
            "settled": timed(some.plan(settled), rounds),
            "changed": timed(some.plan(settled, need), rounds),
        }
        for state, ms in taken.items():
            bench.row(f"{name}_{state}_ms", ms, "ms")
        if bound is not None:
            bench.target(f"{name}_ms", max(taken.values()), "ms", "<=", bound)
    bench.row("arrays_10000_ms", timed(lambda: Curves(some.curves), rounds), "ms")
    bench.row(
        "curves_40_ms", timed(lambda: curves("mean") + curves("mean"), rounds) * 40 / 36, "ms"
    )


def drift(bench: Bench, plans: int) -> None:
    """Plan repeatedly while needs drift; each plan starts from the previous one.

    The sixteen devices hold half of the bytes that about 40 models need.
    """
    random = np.random.default_rng(3)
    some = of_tightness(curves("mean"), bench.size(16, 4), 0.5, 3)
    copies = some.settle([])
    taken, gap, new = [], [], []
    for _ in range(plans):
        some.need = some.need * random.lognormal(0, 0.2, len(some.need))
        work = some.plan(copies)
        begin = perf_counter()
        after = work()
        taken.append((perf_counter() - begin) * 1e3)
        gap.append(some.gap(after))
        before = {(copy.model, copy.first): copy.layers for copy in copies}
        new.append(
            sum(
                some.curves[copy.model].width
                * (
                    some.arrays.nbytes(copy.model, copy.layers)
                    - some.arrays.nbytes(
                        copy.model, min(copy.layers, before.get((copy.model, copy.first), 0))
                    )
                )
                for copy in after
            )
        )
        copies = after
    bench.row("drift_models", len(some.need), "")
    bench.row("drift_plan_ms_p50", statistics.median(taken), "ms")
    bench.row("drift_plan_ms_max", max(taken), "ms")
    bench.row("drift_gap_median", statistics.median(gap), "")
    bench.row("drift_gap_max", max(gap), "")
    bench.row("drift_loaded_share", statistics.mean(new) / (some.devices * CAPACITY), "a plan")


def gaps(bench: Bench, seeds: int) -> None:
    """Plan on empty devices until no exchange is left, and compare with the linear bound."""
    whole = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
    grid = bench.size(whole, (0.5,))
    for objective in ("mean", 0.5, "slo"):
        known = curves(objective)
        for devices in (16, 128):
            found = {}
            for tightness, seed in itertools.product(grid, range(seeds)):
                some = of_tightness(known, bench.size(devices, 4), tightness, seed)
                found[tightness, seed] = some.gap(some.settle([]))
            name = f"improve_gap_{objective}_{devices}"
            bench.row(f"{name}_median", statistics.median(found.values()), "")
            bench.row(f"{name}_max", max(found.values()), "")
            bench.row(f"{name}_max_at", max(found, key=lambda key: found[key])[0], "of wanted")
        if objective == "mean":
            most = max(bench.results[f"improve_gap_mean_{devices}_max"] for devices in (16, 128))
            bench.target("improve_gap_max", most, "", "<=", 0.03)


def million(bench: Bench) -> None:
    """Simulate a million requests on 16 GPUs under this project's own policy, in one process."""
    arrivals = bench.size(50_000.0, 20.0)  # seconds
    workload = azure(paper_models(), 20.0, arrivals, seed=1, service="conv")
    simulate("scheduler", power_law(paper_models(), 1.0, 60.0, seed=1), Hardware())
    taken = seconds(lambda: simulate("scheduler", workload, Hardware()))
    bench.row("sim_requests", len(workload.time), "")
    bench.target("sim_1m_requests_s", taken * 1e6 / len(workload.time), "s", "<=", 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each timed operation")
    parser.add_argument("--seeds", type=int, default=10, help="seeds of each tightness")
    bench = Bench.start("plan", parser, rounds=1, seeds=1)
    print("time", flush=True)
    speed(bench, bench.args.rounds)
    print("drifting needs", flush=True)
    drift(bench, bench.size(200, 3))
    print("gap to the linear bound", flush=True)
    gaps(bench, bench.args.seeds)
    million(bench)
    bench.finish()


if __name__ == "__main__":
    main()
