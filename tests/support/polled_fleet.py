"""A fleet of runtimes without threads, under a manual clock."""

from __future__ import annotations

from collections.abc import Sequence

from warmserve_rt import Runtime
from warmserve_rt.scheduling.fleet import RuntimeFleet
from warmserve_rt.scheduling.scheduler import SETTLE_S


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class PolledFleet:
    """Base of test worlds. A subclass sets the attributes."""

    clock: Clock
    fleet: RuntimeFleet
    runtimes: Sequence[Runtime]

    def ask(self, model: str, times: int = 1) -> None:
        for _ in range(times):
            self.fleet.arrived(model, 128)
            self.fleet.finished(model)

    def plan(self, seconds: float = 1.0) -> None:
        """Let time pass, so that the fleet updates its rates and then makes a plan."""
        for passed in (0.0, seconds, 2 * SETTLE_S):
            self.clock.now += passed
            self.fleet.poll()

    def settle(self, seconds: float = 1.0) -> None:
        """Plan, and let the runtimes finish their loads."""
        self.plan(seconds)
        for runtime in self.runtimes:
            while runtime.step():
                pass
