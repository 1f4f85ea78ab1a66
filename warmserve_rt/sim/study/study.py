"""Compare policies: each serves the same workloads, over several rates and seeds."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from warmserve_rt.sim.controllers.policies import POLICIES, find_policy
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.workload import catalogue, workloads
from warmserve_rt.sim.workload.history import with_history
from warmserve_rt.sim.workload.workloads import Workload

from .metrics import Floats, RunSummary, Slo, summary, times_to_first_token
from .run import check, simulate
from .timeline import DeviceTimeline, Timeline

PAPER = "paper"  # the models of the paper's evaluation
PATIENCE_S = 3600.0  # seconds after the last request until a fleet gives up on unserved ones
GOALS = (0.99, 0.97)  # SLO attainments for which the highest rate is sought


class StudyError(ValueError):
    """Raised for a study that cannot be run. The message tells the reason in one sentence."""


@dataclass(frozen=True)
class Study:
    """The arguments of a comparison.

    Parameters
    ----------
    workload
        One of workloads.NAMES, or a trace file. A file has its own rate and duration, and its runs
        are not random.
    hardware
        The hardware of the fleet.
    models
        A number of models of the catalogue's mix, or "paper".
    policies
        The names of the policies.
    rate
        Requests per second of the runs that are described in full.
    rates
        Requests per second of further runs, which show how much load a policy can take.
    seeds
        The number of paired runs of each policy.
    minutes
        Minutes in which requests arrive.
    history_minutes
        The first minutes of a file that are history; the rest is the run.
    switch_s
        Seconds that every start takes.
    engine_start_s
        Seconds of an engine start, for policies whose starts wait for an engine process.
    engine_starts_s
        Further seconds of an engine start; these policies run once more with each.
    slo
        The bound on the time to first token.

    Raises
    ------
    StudyError
        If an argument is invalid.
    """

    workload: str
    hardware: Hardware
    models: int | str = 24
    policies: tuple[str, ...] = tuple(POLICIES)
    rate: float = 1.0
    rates: tuple[float, ...] = ()
    seeds: int = 5
    minutes: float = 10.0
    history_minutes: float = 0.0
    switch_s: float = 0.01
    engine_start_s: float = 5.0
    engine_starts_s: tuple[float, ...] = ()
    slo: Slo = Slo()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        for rate in (self.rate, *self.rates):
            if not 0 < rate < math.inf:
                raise StudyError(
                    f"rates must be positive and finite requests per second, got {rate:g}"
                )
        if not 0 < self.minutes < math.inf:
            raise StudyError(f"minutes must be positive and finite, got {self.minutes:g}")
        for start in (self.switch_s, self.engine_start_s, *self.engine_starts_s):
            if not 0 <= start < math.inf:
                raise StudyError(
                    f"times of a start must be finite and not negative, got {start:g} s"
                )
        for size in (self.hardware.memory, self.hardware.bandwidth):
            if not math.isfinite(size):
                raise StudyError(
                    f"memory and bandwidth must be finite numbers of bytes, got {size:g}"
                )
        if self.seeds < 1:
            raise StudyError(f"seeds must be at least 1, got {self.seeds}")
        if not self.policies:
            raise StudyError("there must be at least one policy to compare, got none")
        if len(set(self.policies)) < len(self.policies):
            raise StudyError(f"each policy must be given once, got {', '.join(self.policies)}")
        for policy in self.policies:
            try:
                find_policy(policy)
            except ValueError as error:
                raise StudyError(str(error)) from None
        if isinstance(self.models, str) and self.models != PAPER:
            raise StudyError(f"models must be a number or {PAPER!r}, got {self.models!r}")

    @property
    def from_file(self) -> bool:
        return self.workload not in workloads.NAMES

    def build(self, rate: float, seed: int) -> Workload:
        """Return the workload that every policy serves at this rate with this seed.

        Raises
        ------
        ValueError, OSError
            As the workloads do, and if the workload has no requests or no history.
        """
        models = (
            catalogue.paper_models()
            if isinstance(self.models, str)
            else catalogue.mixed(self.models)
        )
        built = workloads.parse(self.workload, models, rate, self.minutes * 60, seed)
        if self.from_file:
            built = with_history(built, self.history_minutes * 60)
        if not len(built.history):
            raise StudyError(f"{self.workload} has no history from which policies could forecast")
        if not len(built.time):
            raise StudyError(
                f"{self.workload} has no requests at {rate:g} per second in {self.minutes:g} "
                f"minutes with seed {seed}: give more minutes"
            )
        return built


@dataclass(frozen=True)
class Run:
    """The arguments of one run: a policy on a workload."""

    policy: str
    rate: float
    seed: int
    engine_start_s: float
    detailed: bool  # whether to keep its times to first token
    watched: bool  # whether to record it over time


@dataclass(frozen=True)
class Watched:
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
    watched: Watched | None


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
                    found.append(Run(policy, rate, seed, start, first, watched=first and seed == 0))
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
    for index, outcome in _each(study, todo, jobs):
        done[index] = outcome
        if progress:
            progress(len(done), len(todo))
    return Result(study, workload, tuple(done[index] for index in range(len(todo))))


def _each(study: Study, todo: list[Run], jobs: int) -> Iterator[tuple[int, Outcome]]:
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
    """Perform one run. Requests that are never served are counted as unserved."""
    workload = _built(study, each.rate, each.seed)
    timeline = Timeline(workload.duration)
    fleets: list[Fleet] = []
    observers: list[Callable[[Fleet], None]] = [fleets.append]
    if each.watched:
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
        if not fleets or fleets[0].now <= workload.time[-1] + PATIENCE_S:
            raise
    fleet = fleets[0]
    ttft = times_to_first_token(fleet) if each.detailed else None
    watched = None
    if each.watched:
        watched = Watched(timeline.times, timeline.link_use, *timeline.busiest())
    return Outcome(each, summary(fleet, study.slo), ttft, watched)
