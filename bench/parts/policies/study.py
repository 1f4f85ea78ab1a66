"""The cases and seeds of a run of policies.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lib.fleets import Case

PAPER = [Case(f"paper-{rate}", "azure-conv", "paper", rate, 900) for rate in (20, 25)]
UNLOADED = Case("paper-15", "azure-conv", "paper", 15, 900)
SCARCE = [
    Case("mixed-24", "azure", "24", 0.6, 1800),
    Case("mixed-40", "azure", "40", 0.6, 1800),
    Case("servegen-periodic", "servegen-periodic", "24", 0.8, 1800),
    Case("servegen-middle", "servegen-middle", "24", 0.8, 1800),
    Case("servegen-aperiodic", "servegen-aperiodic", "24", 0.8, 1800),
]
GRIDS: dict[Case, Sequence[float]] = {
    Case("paper", "azure-conv", "paper", 0, 600): (10, 15, 20, 25, 30),
    Case("mixed-24", "azure", "24", 0, 600): (0.1, 0.4, 1.6, 3.2, 4.8, 6.4, 8, 9.6, 12.8, 16),
    Case("mixed-40", "azure", "40", 0, 900): (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    Case("servegen-periodic", "servegen-periodic", "24", 0, 900): (0.4, 0.8, 1.2, 1.6, 2.4),
    Case("servegen-middle", "servegen-middle", "24", 0, 900): (0.4, 0.8, 1.6, 2.4, 3.2),
    Case("servegen-aperiodic", "servegen-aperiodic", "24", 0, 900): (0.4, 0.8, 1.6, 2.4, 3.2),
}
SHARED = ("mixed-24", "servegen-periodic")  # grids that are also compared with static sharing


@dataclass(frozen=True)
class Study:
    """The cases that a run of the bench simulates.

    ``claimed`` has the cases of the paper's claim, ``every`` those of the comparison with
    WarmServe, and ``grids`` the rates to try for each case. ``starts_s`` has the times of an engine
    start, which must include 5 s, ``interference`` the values for static sharing, which must
    include 0.35.
    """

    seeds: Sequence[int]
    claimed: Sequence[Case]
    every: Sequence[Case]
    scarce: Sequence[Case]
    grids: dict[Case, Sequence[float]]
    starts_s: Sequence[float] = (0.0, 1.0, 2.0, 5.0, 10.0)
    interference: Sequence[float] = (0.0, 0.35, 1.0)

    def shared(self) -> list[Case]:
        """Return the cases of the grids that are also compared with static sharing."""
        return [case for case in self.grids if case.name in SHARED]


def whole(seeds: Sequence[int]) -> Study:
    return Study(seeds, PAPER, [UNLOADED, *PAPER, *SCARCE], SCARCE, GRIDS)


def quick() -> Study:
    """Return a study of a few seconds of arrivals, whose results mean nothing."""
    paper, scarce = ([replace(cases[0], seconds=20.0)] for cases in (PAPER, SCARCE))
    return Study(
        seeds=[1],
        claimed=paper,
        every=[*paper, *scarce],
        scarce=scarce,
        grids={replace(case, seconds=20.0): (0.8,) for case in GRIDS if case.name in SHARED},
        starts_s=(0.0, 5.0),
        interference=(0.35,),
    )
