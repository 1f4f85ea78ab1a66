"""Describe a study, which compares policies that serve the same workloads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from warmserve_rt.sim.controllers.policies import POLICIES, find_policy
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.workload import catalogue, workloads
from warmserve_rt.sim.workload.history import with_history
from warmserve_rt.sim.workload.workloads import Workload

from .metrics import Slo

PAPER = "paper"  # the models of the paper's evaluation
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

        Parameters
        ----------
        rate
            Requests per second.
        seed
            The seed of all draws.

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
