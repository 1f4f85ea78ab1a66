"""Runs many simulations in parallel and computes means and intervals of their results."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import fmean
from typing import Any

from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.study.intervals import interval
from warmserve_rt.sim.study.metrics import RunSummary, summary
from warmserve_rt.sim.study.run import simulate
from warmserve_rt.sim.workload import workloads
from warmserve_rt.sim.workload.catalogue import mixed, paper_models
from warmserve_rt.sim.workload.workloads import Workload


@dataclass(frozen=True)
class Case:
    """A workload on GPUs.

    ``models`` is "paper" or the size of the mix, ``rate`` requests per second, ``seconds`` the time
    of arrivals, ``bandwidth`` GB/s of each host link.
    """

    name: str
    workload: str
    models: str
    rate: float
    seconds: float
    bandwidth: float = 25.0

    def at(self, rate: float) -> Case:
        return replace(self, rate=rate)


@dataclass(frozen=True)
class Run:
    case: Case
    policy: str
    seed: int
    multipath: int = 1
    devices: int = 16
    memory: float = 72e9  # bytes of each GPU
    interference: float = 0.35
    engine_start_s: float = 5.0
    options: tuple[tuple[str, Any], ...] = field(default=())


@lru_cache(maxsize=4)
def _workload(case: Case, seed: int) -> Workload:
    models = paper_models() if case.models == "paper" else mixed(int(case.models))
    return workloads.parse(case.workload, models, case.rate, case.seconds, seed)


def workload_of(case: Case, seed: int) -> Workload:
    """Return the case's workload, which does not depend on the bandwidth."""
    return _workload(replace(case, bandwidth=0.0), seed)


def perform(run: Run) -> RunSummary:
    hardware = Hardware(
        devices=run.devices,
        memory=run.memory,
        bandwidth=run.case.bandwidth * 1e9,
        multipath=run.multipath,
        interference=run.interference,
    )
    fleet = simulate(
        run.policy,
        workload_of(run.case, run.seed),
        hardware,
        engine_start_s=run.engine_start_s,
        policy_options=dict(run.options),
    )
    return summary(fleet)


def perform_all(runs: Iterable[Run]) -> dict[Run, RunSummary]:
    """Perform each run once, in one process per CPU."""
    wanted = list(dict.fromkeys(runs))
    context = multiprocessing.get_context("spawn")
    processes = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return dict(zip(wanted, pool.map(perform, wanted, chunksize=1), strict=True))


def mean_of(found: Mapping[Run, RunSummary], run: Run, seeds: Iterable[int], what: str) -> float:
    """Return the mean over seeds of a field of the summaries."""
    return fmean(getattr(found[replace(run, seed=seed)], what) for seed in seeds)


def geomean(values: Iterable[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def jackknife(of: Callable[[Sequence[int]], float], seeds: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of a positive number that ``of`` computes from paired seeds.

    This is Tukey's jackknife of the logarithm: Student's t of the pseudo-values, centred on the
    number itself. Raises ValueError for fewer than two seeds.
    """
    if len(seeds) < 2:
        raise ValueError(f"an interval needs at least 2 seeds, got {len(seeds)}")
    n, whole = len(seeds), math.log(of(seeds))
    without = [math.log(of([seed for seed in seeds if seed != left])) for left in seeds]
    found = interval([n * whole - (n - 1) * part for part in without])
    assert found.high is not None
    half = found.high - found.mean
    return math.exp(whole - half), math.exp(whole + half)
