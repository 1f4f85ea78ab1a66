"""A comparison of policies: every one of them serves the same workloads, over rates and seeds."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from warmserve_rt.sim.controllers.policies import POLICIES, find
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.workload import catalogue, workloads
from warmserve_rt.sim.workload.history import with_history
from warmserve_rt.sim.workload.workloads import Workload

from .metrics import Floats, RunSummary, Slo, summary, times_to_first_token
from .run import check, simulate
from .timeline import DeviceTimeline, Timeline

PAPER = "paper"  # the models of the paper's evaluation
PATIENCE_S = 3600.0  # after the last request a fleet gives up on those it has not served
GOALS = (0.99, 0.97)  # attainment of the SLO for which the highest rate is sought


class StudyError(ValueError):
    """A study that cannot be made; the message says why in one sentence."""


@dataclass(frozen=True)
class Study:
    """``workload``: one of workloads.NAMES or a trace file; a file has a rate, a duration and
    nothing random of its own, and its first ``history_minutes`` are the past, the rest the run.
    ``models``: so many of the catalogue's mix, or "paper".

    ``rate``: requests per second of the runs that are described in full; ``rates``: of those that
    say how much a policy can take. ``engine_start_s``: of policies whose starts wait for an engine
    process; with each of ``engine_starts_s`` they run once more.

    Raises StudyError for numbers that make no sense.
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
                    f"a rate of {rate:g} requests per second; it is positive and finite"
                )
        if not 0 < self.minutes < math.inf:
            raise StudyError(f"a run of {self.minutes:g} minutes; it is positive and finite")
        for start in (self.switch_s, self.engine_start_s, *self.engine_starts_s):
            if not 0 <= start < math.inf:
                raise StudyError(f"a start of {start:g} s; it is finite and not negative")
        for size in (self.hardware.memory, self.hardware.bandwidth):
            if not math.isfinite(size):
                raise StudyError(f"memory and bandwidth are finite numbers of bytes, not {size:g}")
        if self.seeds < 1:
            raise StudyError(f"{self.seeds} seeds; there is at least one")
        if not self.policies:
            raise StudyError("no policies to compare; there is at least one")
        if len(set(self.policies)) < len(self.policies):
            raise StudyError(f"a policy twice: {', '.join(self.policies)}")
        for policy in self.policies:
            try:
                find(policy)
            except ValueError as error:
                raise StudyError(str(error)) from None
        if isinstance(self.models, str) and self.models != PAPER:
            raise StudyError(f"models: a number or {PAPER!r}, not {self.models!r}")

    @property
    def from_file(self) -> bool:
        return self.workload not in workloads.NAMES

    def build(self, rate: float, seed: int) -> Workload:
        """What every policy serves at this rate, with this seed.

        Raises ValueError and OSError as the workloads do, and for one without requests or history.
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
            raise StudyError(f"{self.workload}: no history, from which policies could forecast")
        if not len(built.time):
            raise StudyError(
                f"{self.workload}: no requests at {rate:g} a second in {self.minutes:g} minutes "
                f"with seed {seed}; more minutes have some"
            )
        return built


@dataclass(frozen=True)
class Run:
    """One policy on one workload."""

    policy: str
    rate: float
    seed: int
    engine_start_s: float
    detailed: bool  # with its times to first token
    watched: bool  # and what it looked like over time


@dataclass(frozen=True)
class Watched:
    """One run over time: the device on which the most models served, and all links together."""

    times: list[float]
    link_use: list[float]
    device: int
    memory: DeviceTimeline


@dataclass(frozen=True)
class Outcome:
    """What came of a run. ``ttft``: see metrics.times_to_first_token; only of detailed runs."""

    run: Run
    summary: RunSummary
    ttft: Floats | None
    watched: Watched | None


@dataclass(frozen=True)
class Result:
    """``study`` as it was run: a file's is its own rate and duration, and one seed. ``outcomes`` in
    the order of ``runs(study)``."""

    study: Study
    workload: Workload
    outcomes: tuple[Outcome, ...]


def runs(study: Study) -> list[Run]:
    """All that a study takes, runs of one workload next to each other."""
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
    """The study as it can be run, and its first workload.

    Raises StudyError for whatever makes it impossible, before anything has run.
    """
    if study.from_file and not Path(study.workload).is_file():
        known = ", ".join(workloads.NAMES)
        raise StudyError(f"{study.workload!r} is no workload and no file; there are {known}")
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
    """Every run, in ``jobs`` processes, which change nothing of the result.

    ``progress`` is told how many runs of how many are done, and that none is at the beginning.
    Raises StudyError as ``prepare`` does, and where a seed has no requests.
    """
    if jobs < 1:
        raise StudyError(f"{jobs} processes; there is at least one")
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
    """Outcomes with their places, as they come."""
    if jobs == 1:
        for index, each in enumerate(todo):
            yield index, perform(study, each)
        return
    # Not forked: the caller's threads may hold locks.
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
    """One run. Requests that are never served count as such."""
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
    except RuntimeError:  # some are left, and have no time; anything else is no result
        if not fleets or fleets[0].events.now <= workload.time[-1] + PATIENCE_S:
            raise
    fleet = fleets[0]
    ttft = times_to_first_token(fleet) if each.detailed else None
    watched = None
    if each.watched:
        watched = Watched(timeline.times, timeline.link_use, *timeline.busiest())
    return Outcome(each, summary(fleet, study.slo), ttft, watched)
