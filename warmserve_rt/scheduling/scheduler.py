"""The loop that turns snapshots into tickets: which leading layers of which models each device
should hold, what to load for that, and the keep values that say what goes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from warmserve_rt.policy.curve import ValueCurve
from warmserve_rt.policy.demand import Demand
from warmserve_rt.policy.explain import sentence
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.improve import Copy, Curves, improve
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.policy.slo import Slo

Stamps = list[tuple[float, float]]  # bytes of leading layers up to which a keep value holds
SETTLE_S = 0.05  # after a change, for more of them to come
START_S = 0.01  # allowed for what no cost model knows
# A busy device counts for little against what it holds. Its share of time would have everything
# popular held several times over; held once for each model, and started where it lies, memory saves
# more (bench/policies.py: 40 % fewer misses with 24 models). What is left over is held twice.
BUSY_COUNTS = 0.01
FLEET_PART = 0.7  # of that share, the fleet's mean: one device's own is noise for minutes
REST = 5  # intervals without a change or an improvement until demand is looked at again
REVALUE_S = 60.0  # prompts change slowly


class ShardView(Protocol):
    """The leading ``layers`` of one rank of a model that a device holds. ``goal``: with those that
    are on their way; ``pinned``: in use."""

    @property
    def layers(self) -> int: ...
    @property
    def goal(self) -> int: ...
    @property
    def pinned(self) -> bool: ...


class DeviceView(Protocol):
    """``occupants``: of each instance on it the model and the first of its devices, and whether it
    is active, that is has work or loads. ``room``: bytes that layers may take, without those of
    active instances."""

    index: int

    @property
    def shards(self) -> Mapping[tuple[int, int], ShardView]: ...
    @property
    def occupants(self) -> Mapping[tuple[int, int], bool]: ...
    @property
    def room(self) -> float: ...


class FleetView(Protocol):
    """What a scheduler sees, and what it can have done. Layers of rank r of a model w devices wide
    are useful on devices whose index is r modulo w; groups lie within nodes of ``node_devices``."""

    profiles: Sequence[ModelProfile]
    bandwidth: float
    switch_s: float
    node_devices: int

    @property
    def now(self) -> float: ...
    @property
    def devices(self) -> Sequence[Any]: ...
    def after(self, seconds: float, call: Callable[[], None]) -> None: ...
    def stamp(self, device: Any, shard: Any, layers: int, stamps: Stamps) -> None:
        """So many leading layers are to stay, with these keep values; the others have none."""

    def load(self, device: Any, model: int, rank: int, layers: int, stamps: Stamps) -> bool:
        """Begins to load what lacks of its leading layers, in the background and in place of what
        has lower keep values; False where that is not room enough."""

    def call_off(self, device: Any, shard: Any, layers: int) -> None:
        """Loads no more than its leading layers."""


class Scheduler:
    """Decides which layers are resident where: at every change, every ``interval`` seconds while
    there is something to improve, and else in every fifth.

    ``objective``: "mean", "slo" or a weight between, see `value_curve`. ``horizon``: seconds for
    which a plan provides. ``margin``: the share by which something must be better than what it
    displaces. ``copies``: most groups that hold a model. ``busy_memory``: seconds over which the
    share is averaged in which a device is not to be had. ``moves``: most exchanges in one plan.
    ``dry_run``: loads and stamps nothing; :meth:`explain` says what it would do.
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
        dry_run: bool = False,
        memory: float = 120.0,
        recent: float = 0.25,
    ) -> None:
        self.objective, self.slo = objective, slo
        self.horizon, self.interval, self.margin = horizon, interval, margin
        self.copies, self.busy_memory, self.moves = copies, busy_memory, moves
        self.dry_run = dry_run
        self.memory, self.recent = memory, recent
        self.before: list[Copy] = []
        self.held: list[Copy] = []
        self._planned, self._improving, self._rested = True, False, 0

    def begin(self, fleet: FleetView, forecaster: Forecaster, service: Sequence[float]) -> None:
        """From now on it decides for this fleet. ``service``: seconds of each model's requests."""
        self.fleet = fleet
        self.demand = self.make_demand(fleet, forecaster, service)
        self.busy = np.zeros(len(fleet.devices))
        self._revalue()
        self.plan()
        fleet.after(self.interval, self._tick)

    def make_demand(
        self, fleet: FleetView, forecaster: Forecaster, service: Sequence[float]
    ) -> Demand:
        """What it knows of the models' demand."""
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

    def changed(self) -> None:
        """What devices do is no longer the same: a new plan follows soon."""
        if self._planned:
            self._planned = False
            self.fleet.after(SETTLE_S, self.plan)

    def arrange(
        self,
        profiles: Sequence[ModelProfile],
        service: Sequence[float],
        rows: Sequence[int | None],
    ) -> None:
        """The fleet has these models from now on: the i-th is the one that was ``rows[i]``-th, or a
        new one. A new plan follows soon."""
        self.demand.arrange(profiles, service, rows)
        self._use_curves()
        self.before, self.held, self.needed = [], [], np.zeros(len(profiles))
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
        self.marks = [_marks(curve) for curve in self.demand.curves]

    def plan(self) -> None:
        """Looks at the fleet, improves on what is there, and has it done."""
        self._planned, self._rested = True, 0
        if not self.fleet.profiles:
            self._improving = False
            return
        self.demand.forecast(self.fleet.now, self.horizon)
        need = self.demand.need(self.horizon)
        copies, free = self.snapshot()
        held = improve(
            self.curves,
            need,
            copies,
            free,
            1.0 - BUSY_COUNTS * (FLEET_PART * self.busy.mean() + (1 - FLEET_PART) * self.busy),
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

    def explain(self) -> list[str]:
        """What the last plan changes, a sentence for each group that gains layers, and for each
        model that has need and is held nowhere."""
        before = {(copy.model, copy.first): copy.layers for copy in self.before}
        after = {(copy.model, copy.first): copy.layers for copy in self.held}
        curves, said = self.demand.curves, []
        for copy in self.held:
            if copy.layers <= before.get((copy.model, copy.first), 0):
                continue
            mine = range(copy.first, copy.first + curves[copy.model].width)
            gone = [
                (curves[other.model], other.layers - after.get((other.model, other.first), 0))
                for other in self.before
                if other.layers > after.get((other.model, other.first), 0)
                and other.first < mine.stop
                and other.first + curves[other.model].width > mine.start
            ]
            need = float(self.needed[copy.model]) * copy.use
            said.append(sentence(curves[copy.model], need, copy.layers, copy.first, gone))
        nowhere = set(range(len(curves))) - {copy.model for copy in self.held}
        said += [
            sentence(curves[model], float(self.needed[model]), 0, 0, ())
            for model in sorted(nowhere)
            if self.needed[model] > 0
        ]
        return said

    def snapshot(self) -> tuple[list[Copy], npt.NDArray[np.float64]]:
        """The complete groups that hold something of a model, and the bytes that are left on each
        device for more. What an active instance uses is no copy that another start could have."""
        fleet = self.fleet
        devices, node = fleet.devices, fleet.node_devices
        free = np.array([device.room for device in devices], np.float64)
        found: list[Copy] = []
        for first, device in enumerate(devices):
            for (model, rank), shard in device.shards.items():
                if rank:
                    continue
                width = fleet.profiles[model].width
                if first % width or first % node + width > node:
                    continue
                layers = shard.goal
                for r in range(1, width):
                    other = devices[first + r].shards.get((model, r))
                    layers = min(layers, other.goal) if other else 0
                if not layers:
                    continue
                active = device.occupants.get((model, first))
                if not active:
                    free[first : first + width] -= self.curves.nbytes(model, layers)
                fixed = active is not None or shard.pinned
                found.append(Copy(model, first, layers, fixed=fixed))
        return found, free

    def apply(self, held: Sequence[Copy], need: npt.NDArray[np.float64]) -> None:
        """Stamps what is there, calls off what is no longer wanted, loads what lacks."""
        fleet = self.fleet
        wanted: dict[tuple[int, int, int], tuple[int, Stamps]] = {}
        for copy in held:
            weight = float(need[copy.model]) * copy.use
            stamps = [(end, weight * density) for end, density in self.marks[copy.model]]
            for rank in range(fleet.profiles[copy.model].width):
                wanted[copy.first + rank, copy.model, rank] = (copy.layers, stamps)
        for device in fleet.devices:
            for (model, rank), shard in list(device.shards.items()):
                layers, stamps = wanted.get((device.index, model, rank), (0, []))
                fleet.stamp(device, shard, layers, stamps)
                if not shard.pinned and shard.goal > max(layers, shard.layers):
                    fleet.call_off(device, shard, max(layers, shard.layers))
        for (index, model, rank), (layers, stamps) in wanted.items():
            device = fleet.devices[index]
            there = device.shards.get((model, rank))
            if there is None or there.goal < layers:
                fleet.load(device, model, rank, layers, stamps)


def _marks(curve: ValueCurve) -> Stamps:
    """Of each segment of a curve's hull: the bytes where it ends, and seconds saved for a byte."""
    knots = curve.knots
    return [
        (float(curve.cumulative[end]), float(curve.density[end - 1])) for end in knots[1:].tolist()
    ]
