"""Perform the runs of a study: each policy at several rates, with several seeds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from warmserve_rt.sim.controllers.policies import POLICIES
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.workload import workloads
from warmserve_rt.sim.workload.workloads import Workload

from .metrics import Floats, RunSummary, summary, times_to_first_token
from .run import check, simulate
from .study import Study, StudyError
from .timeline import DeviceTimeline, Timeline

GIVE_UP_S = 3600.0  # seconds after the last request until a fleet gives up on unserved ones


@dataclass(frozen=True)
class Run:
    """The arguments of one run: a policy on a workload."""

    policy: str
    rate: float
    seed: int
    engine_start_s: float
    detailed: bool  # whether to keep its times to first token
    recorded: bool  # whether to record it over time


@dataclass(frozen=True)
class Recording:
    """The record of one run over time: the device that served most models, and all links."""

    times: list[float]
    link_use: list[float]
    device: int
    memory: DeviceTimeline


@dataclass(frozen=True)
class Outcome:
    """The results of a run. ``ttft``: see metrics.times_to_first_token; only for detailed runs."""

    run: Run
    summary: RunSummary
    ttft: Floats | None
    recording: Recording | None


@dataclass(frozen=True)
class Result:
    """The results of a study.

    ``study``: the study as it was run. For a trace file it has the file's rate and duration, and
    one seed. ``workload``: the first workload. ``outcomes``: in the order of ``runs(study)``.
    """

    study: Study
    workload: Workload
    outcomes: tuple[Outcome, ...]


def runs(study: Study) -> list[Run]:
    """Return all runs of a study. Runs of the same workload are adjacent."""
    found = []
    for rate in sorted({study.rate, *study.rates}):
        for seed in range(study.seeds):
            described = rate == study.rate
            for policy in study.policies:
                starts = [study.engine_start_s]
                if described and POLICIES[policy].engine_start:
                    starts += [s for s in study.engine_starts_s if s != study.engine_start_s]
                for start in starts:
                    first = described and start == study.engine_start_s
                    found.append(
                        Run(policy, rate, seed, start, first, recorded=first and seed == 0)
                    )
    return found


def prepare(study: Study) -> tuple[Study, Workload]:
    """Return the study as it will be run, and its first workload.

    Raises
    ------
    StudyError
        If the study cannot be run. No run has begun then.
    """
    if study.from_file and not Path(study.workload).is_file():
        known = ", ".join(workloads.NAMES)
        raise StudyError(
            f"{study.workload!r} is neither a file nor a workload: choose one of {known}"
        )
    try:
        workload = study.build(study.rate, 0)
        check(workload.models, study.hardware)
        study.slo.check(workload)
    except (ValueError, OSError) as error:
        raise StudyError(str(error)) from error
    if study.from_file:
        rate = len(workload.time) / workload.duration
        study = replace(study, rate=rate, rates=(), seeds=1, minutes=workload.duration / 60)
    return study, workload


def run(study: Study, jobs: int, progress: Callable[[int, int], None] | None = None) -> Result:
    """Run a whole study.

    Parameters
    ----------
    study
        The study.
    jobs
        The number of processes. It does not change the result.
    progress
        Called with the number of runs that are done and the number of all runs, at the beginning
        and after each run.

    Raises
    ------
    StudyError
        As ``prepare`` does, if a seed has no requests, or if ``jobs`` is less than 1.
    """
    if jobs < 1:
        raise StudyError(f"jobs must be at least 1 process, got {jobs}")
    study, workload = prepare(study)
    todo = runs(study)
    done: dict[int, Outcome] = {}
    if progress:
        progress(0, len(todo))
    for index, outcome in _outcomes(study, todo, jobs):
        done[index] = outcome
        if progress:
            progress(len(done), len(todo))
    return Result(study, workload, tuple(done[index] for index in range(len(todo))))


def _outcomes(study: Study, todo: list[Run], jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Yield the index and the outcome of each run when it is done."""
    if jobs == 1:
        for index, each in enumerate(todo):
            yield index, perform(study, each)
        return
    # Spawned, not forked: the caller's threads may hold locks.
    spawned = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(todo)), mp_context=spawned)
    try:
        places = {pool.submit(perform, study, each): i for i, each in enumerate(todo)}
        for future in as_completed(places):
            yield places[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=2)
def _built(study: Study, rate: float, seed: int) -> Workload:
    return study.build(rate, seed)


def perform(study: Study, each: Run) -> Outcome:
    """Perform one run. Requests that are never served are counted as unserved.

    Parameters
    ----------
    study
        The study.
    each
        One of its runs.
    """
    workload = _built(study, each.rate, each.seed)
    timeline = Timeline(workload.duration)
    fleets: list[Fleet] = []
    observers: list[Callable[[Fleet], None]] = [fleets.append]
    if each.recorded:
        observers.append(timeline)
    try:
        simulate(
            each.policy,
            workload,
            study.hardware,
            switch_s=study.switch_s,
            engine_start_s=each.engine_start_s,
            observers=observers,
        )
    except RuntimeError:  # unserved requests are a result; other errors are raised
        if not fleets or fleets[0].now <= workload.time[-1] + GIVE_UP_S:
            raise
    fleet = fleets[0]
    ttft = times_to_first_token(fleet) if each.detailed else None
    recording = None
    if each.recorded:
        recording = Recording(timeline.times, timeline.link_use, *timeline.busiest())
    return Outcome(each, summary(fleet, study.slo), ttft, recording)
