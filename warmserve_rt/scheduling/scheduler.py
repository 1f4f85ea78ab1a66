"""Decide when to plan, and which leading layers of which models each device should hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from warmserve_rt.policy._arrays import F64
from warmserve_rt.policy.demand import Demand
from warmserve_rt.policy.explain import explain
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.improve import Copy, Curves, improve
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.policy.slo import Slo

from .copies import carry_out, densities, held_copies
from .host_plan import HostPlan, explain_host, file_seconds, plan_host
from .protocols import Fleet

SETTLE_S = 0.05  # wait after a change, so that one plan covers several changes
START_S = 0.01  # allowance for delays that the cost models leave out
# Weight of a device's busy share in its availability. With weight 1 a plan holds several copies of
# every popular model. Memory saves more if each model is held once and started on the devices that
# hold it (bench/policies.py: 40 % fewer misses with 24 models). Second copies take spare memory.
BUSY_COUNTS = 0.01
FLEET_PART = 0.7  # weight of the fleet's mean in that share: one device's own is noise for minutes
REST = 5  # intervals without a change or an improvement until the next plan
REVALUE_S = 60.0  # seconds between valuations of the curves: prompts change slowly


class Scheduler:
    """Decide which layers are resident on which devices.

    Each plan has two tiers: the layers that devices hold, and then those that host tiers hold.
    A new plan is made after every change, every ``interval`` seconds while plans still change
    something, and otherwise in every fifth interval.

    Parameters
    ----------
    objective
        "mean", "slo", or a weight in [0, 1] between them; see `value_curve`.
    slo
        The latency targets of the "slo" objective.
    horizon
        Seconds that a plan looks ahead.
    interval
        Seconds between plans.
    margin
        The share by which a gain must exceed the loss of the layers that it displaces.
    copies
        The largest number of groups that hold one model.
    busy_memory
        Seconds over which the share of time is averaged in which a device is busy.
    moves
        The largest number of exchanges in one plan.
    plan_hosts
        Whether to plan the host tiers of the fleet. Otherwise these keep the layers that were
        loaded last.
    dry_run
        Whether to load nothing and set no keep value; :meth:`explain` then tells what a plan would
        change.
    memory, recent
        See :class:`Demand`.
    """

    def __init__(
        self,
        *,
        objective: float | str = 0.7,
        slo: Slo | None = None,
        horizon: float = 30.0,
        interval: float = 2.0,
        margin: float = 0.5,
        copies: int = 6,
        busy_memory: float = 300.0,
        moves: int = 16,
        plan_hosts: bool = True,
        dry_run: bool = False,
        memory: float = 120.0,
        recent: float = 0.25,
    ) -> None:
        self.objective, self.slo = objective, slo
        self.horizon, self.interval, self.margin = horizon, interval, margin
        self.copies, self.busy_memory, self.moves = copies, busy_memory, moves
        self.plan_hosts, self.dry_run = plan_hosts, dry_run
        self.memory, self.recent = memory, recent
        self.before: list[Copy] = []
        self.held: list[Copy] = []
        self.host_plans: list[HostPlan] = []
        self.needed: F64 = np.zeros(0)
        self._planned, self._improving, self._rested = True, False, 0

    def begin(self, fleet: Fleet, forecaster: Forecaster, service: Sequence[float]) -> None:
        """Start to schedule this fleet and make the first plan.

        Parameters
        ----------
        fleet
            The fleet to schedule.
        forecaster
            The forecaster of the fleet's models, in their order.
        service
            Seconds that a request of each model takes.

        Notes
        -----
        ``fleet.after`` is called for every later plan.
        """
        self.fleet = fleet
        self.demand = self.make_demand(fleet, forecaster, service)
        self.busy = np.zeros(len(fleet.devices))
        self._revalue()
        self.plan()
        fleet.after(self.interval, self._tick)

    def make_demand(self, fleet: Fleet, forecaster: Forecaster, service: Sequence[float]) -> Demand:
        """Return the object that tracks the demand for the models. Subclasses may override it."""
        return Demand(
            fleet.profiles,
            forecaster,
            service,
            bandwidth=fleet.bandwidth,
            delay=fleet.switch_s + START_S,
            slo=self.slo,
            objective=self.objective,
            memory=self.memory,
            recent=self.recent,
        )

    def arrived(self, model: int, now: float, concurrent: int, prompt: int) -> None:
        """Record that a request has arrived. This is not a change of the fleet's state.

        Parameters
        ----------
        model
            The number of the model.
        now
            The time of the arrival in seconds.
        concurrent
            The number of requests that the model has now.
        prompt
            The number of tokens of the request's prompt.
        """
        self.demand.arrived(model, now, concurrent, prompt)

    def finished(self, model: int, now: float, concurrent: int) -> None:
        """Record that a request has ended at ``now``, so that the model has ``concurrent`` requests
        left."""
        self.demand.finished(model, now, concurrent)

    def lost(self, model: int) -> list[Sequence[float]]:
        """Return for each device, for each number of layers that it holds, the seconds that a start
        of the model loses against a start with all layers."""
        lost = self.demand.lost[model]
        found: list[Sequence[float]] = [lost] * len(self.fleet.devices)
        for host in self.fleet.hosts:
            from_files = (np.array(lost) + file_seconds(self.fleet, host, model)).tolist()
            for index in host.devices:
                found[index] = from_files
        return found

    def urgency(self, model: int, running: int, seconds: float) -> float:
        """Return the probability that the model needs one instance more than ``running`` within
        ``seconds``."""
        return self.demand.urgency(model, running, seconds)

    def changed(self) -> None:
        """Tell that the state of the fleet has changed. A new plan follows after ``SETTLE_S``."""
        if self._planned:
            self._planned = False
            self.fleet.after(SETTLE_S, self.plan)

    def arrange(
        self,
        profiles: Sequence[ModelProfile],
        service: Sequence[float],
        rows: Sequence[int | None],
    ) -> None:
        """Replace the fleet's models. A new plan follows after ``SETTLE_S``.

        Parameters
        ----------
        profiles
            The profiles of the models.
        service
            Seconds that a request of each model takes.
        rows
            For each model its number before this call, or None if the model is new.
        """
        self.demand.arrange(profiles, service, rows)
        self._use_curves()
        self.before, self.held, self.needed = [], [], np.zeros(len(profiles))
        self.host_plans = []
        self.changed()

    def _tick(self) -> None:
        share = 1 - math.exp(-self.interval / self.busy_memory)
        active = np.array([any(d.occupants.values()) for d in self.fleet.devices], np.float64)
        self.busy += share * (active - self.busy)
        self._rested += 1
        if self._improving or self._rested >= REST:
            self.changed()
        self.fleet.after(self.interval, self._tick)

    def _revalue(self) -> None:
        self.demand.value()
        self._use_curves()
        self.fleet.after(REVALUE_S, self._revalue)

    def _use_curves(self) -> None:
        self.curves = Curves(self.demand.curves)
        self.densities = [densities(curve) for curve in self.demand.curves]

    def plan(self) -> None:
        """Take a snapshot of the fleet, compute an improved plan and apply it."""
        self._planned, self._rested = True, 0
        if not self.fleet.profiles:
            self._improving = False
            return
        self.demand.forecast(self.fleet.now, self.horizon)
        need = self.demand.need(self.horizon)
        copies, free = self.snapshot()
        busy = FLEET_PART * self.busy.mean() + (1 - FLEET_PART) * self.busy
        held = improve(
            self.curves,
            need,
            copies,
            free,
            1.0 - BUSY_COUNTS * busy,
            self.fleet.node_devices,
            margin=self.margin,
            most=self.copies,
            moves=self.moves,
        )
        self.before, self.held, self.needed = copies, held, need
        self._improving = {(c.model, c.first, c.layers) for c in held} != {
            (c.model, c.first, c.layers) for c in copies
        }
        if not self.dry_run:
            self.apply(held, need)
        if self.plan_hosts:
            self.host_plans = [
                plan_host(self.fleet, host, held, need, self.demand, margin=self.margin)
                for host in self.fleet.hosts
            ]
            if not self.dry_run:
                for plan in self.host_plans:
                    plan.host.hold(plan.values)

    def explain(self) -> list[str]:
        """Describe the last plan in sentences: one for each group that gains layers, one for each
        model that is needed and held nowhere, and one for each model that gains layers in a host
        tier."""
        said = explain(self.demand.curves, self.needed, self.before, self.held)
        for plan in self.host_plans:
            said += explain_host(plan, self.fleet.profiles)
        return said

    def snapshot(self) -> tuple[list[Copy], F64]:
        """Return the complete groups that hold layers of a model, and the bytes that are free on
        each device.

        A copy that an active instance uses is fixed, because another start cannot use it.
        """
        return held_copies(self.fleet, self.curves)

    def apply(self, held: Sequence[Copy], need: F64) -> None:
        """Carry out a plan: set the keep values of resident layers, cancel loads that are no longer
        wanted, and load missing layers.

        Parameters
        ----------
        held
            The copies of the plan.
        need
            The need of each model, as :meth:`Demand.need` returns it.
        """
        carry_out(self.fleet, held, need, self.densities)
