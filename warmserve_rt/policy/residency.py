"""Decide which leading layers of which replica to hold on which device group.

The value of a layer is the expected number of starts before the next plan times the seconds that
the layer saves at each. With the concave hull of every replica's
:class:`~warmserve_rt.policy.curve.ValueCurve` this is a knapsack problem. A greedy algorithm takes
segments by value per byte, and the linear relaxation bounds the distance from the best plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ._greedy import F64, I64, Bools, relax, walk
from ._items import Fleet, Items, Segments, make_items
from .problem import Catalogue, Problem

__all__ = ["Catalogue", "Plan", "Problem", "plan", "replan"]

_NEAR = 0.002  # as a share of the bound: a plan this near to it ends the tries
_FIRST = 1e12  # factor that moves segments before all others
_TRIED = 4000  # segments over all tries: among more segments tries gain little


@dataclass(frozen=True, eq=False)
class Plan:
    """A decision which layers to hold.

    ``group``: for each replica the first device of its group, or -1 if it is not held. ``layers``:
    the number of its leading layers to hold. ``value``: the expected seconds saved. ``bound``: no
    plan saves more. A layer outside the plan may stay until its room is needed;
    :meth:`keep_values` gives the order of evictions.
    """

    problem: Problem
    group: I64
    layers: I64
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """Return (bound - value) / bound: the best plan is better by at most this share of it."""
        return (self.bound - self.value) / self.bound if self.bound > 0 else 0.0

    def keep_values(self, row: int) -> F64:
        """Return the keep values of a replica's layers, by the model's own index.

        They are seconds saved per byte (of all devices), and fall in the order in which layers are
        held.
        """
        curve = self.problem.catalogue.curves[self.problem.model[row]]
        stamps = np.empty(len(curve.order))
        stamps[curve.order] = curve.density * self.problem.need[row]
        return stamps

    def units(self, row: int) -> I64:
        """Return the model's own indices of the units that a replica holds."""
        curve = self.problem.catalogue.curves[self.problem.model[row]]
        held: I64 = curve.order[: self.layers[row]]
        return held

    def device_bytes(self) -> I64:
        """Return the bytes that the plan holds on each device."""
        models, model = self.problem.catalogue, self.problem.model
        held = models.cum[models.begin[model] + self.layers]
        edges = np.zeros(len(self.problem.capacity) + 1, dtype=np.int64)
        placed = self.group >= 0
        np.add.at(edges, self.group[placed], held[placed])
        np.add.at(edges, (self.group + models.width[model])[placed], -held[placed])
        held_bytes: I64 = np.cumsum(edges)[:-1]
        return held_bytes


def plan(problem: Problem, previous: Plan | None = None, *, tries: int = 16) -> Plan:
    """Make a plan greedily by value per byte, and bound the value of any plan.

    The greedy takes the segments of all replicas' hulls in order of value per byte. The first
    segment of a replica that is accepted chooses its group. This is its home if the segment fits
    there. Otherwise it is the group with most room, weighted by availability, after room is
    reserved for layers of others that stay; a group that holds the same model is excluded. If a
    segment does not fit as a whole, the best part of its layers that fits waits for its turn by its
    own value per byte.

    If a plan depends on few wide replicas, the order of segments decides how they fit beside each
    other. Up to ``tries`` orders are therefore tried, and fewer if there are many segments or the
    gap is small. The first order puts all held layers first, and the second is the plain one. Each
    further order moves the replicas that got less than in the relaxation forward, by a factor of at
    most e (Joslin and Clements, "Squeaky wheel optimization", 1999). The plan of the highest value,
    bonus included, is returned. A layer that moves therefore gains more than ``margin`` times its
    value. With one try (or more than 2000 segments) only the plain order is tried, and no layer of
    such a plan moves while needs change by less than ``margin``.

    The bound is that of the relaxation in which any share of a segment may be held. A replica's
    value is at most its hull. Replicas whose width is a multiple of w fill all devices of an
    aligned group of w alike, so that together they hold at most w times the smallest device of each
    group, over all groups of w. These limits (for the widths of a chain 1 | w | w' ...) are nested,
    and over nested limits taking the densest first is optimal: a laminar polymatroid. If a model
    has more replicas than groups, only its most needed replicas count. The bonus of ``margin`` is
    in neither value nor bound, so that the gap contains its cost.

    Parameters
    ----------
    problem
        The replicas and devices.
    previous
        The plan that is in place, of the same replicas and devices. It replaces ``home`` and
        ``held`` of the problem.
    tries
        The largest number of orders to try.

    Raises
    ------
    ValueError
        If ``tries`` is less than 1, or the previous plan has another number of replicas.
    """
    if tries < 1:
        raise ValueError(f"tries must be at least 1, got {tries}")
    if previous is not None:
        if len(previous.group) != len(problem.model):
            raise ValueError(
                f"the previous plan must have {len(problem.model)} replicas, "
                f"has {len(previous.group)}"
            )
        problem = replace(problem, home=previous.group, held=previous.layers)
    # Copies are contiguous and writable. The loops would be compiled again for other arrays.
    models, model, need = problem.catalogue, problem.model.copy(), problem.need.copy()
    home = np.full(len(model), -1) if problem.home is None else problem.home.copy()
    fleet = Fleet.of(problem.capacity, problem.availability, problem.node_devices, models.widths)
    segments, room = models.segments, fleet.room[models.kind]
    if (models.cum[models.begin[1:] - 1] > room).any():
        segments = Segments.of(models.begin, models.cum, models.value, models.width, room)
    items = make_items(segments, models.begin, models.cum, model, need, home, problem.held)

    counted = _counted(problem, fleet)
    order = np.argsort(-items.density, kind="stable")
    bound, share = _relax(problem, items, order[counted[items.row[order]]], fleet)
    favoured = items.density
    if items.there.any():
        favoured = np.where(items.there, favoured * (1 + problem.margin), favoured)
        order = np.argsort(-favoured, kind="stable")
        _, share = _relax(problem, items, order[counted[items.row[order]]], fleet)
    stays = items.there & (share > 0.5)
    fleet.reserve(items.row[stays], items.nbytes[stays], home, models.width[model])

    promised = np.bincount(
        items.row, share * items.density * items.nbytes * models.width[model][items.row], len(model)
    )
    best, most, forward = None, -np.inf, np.ones(len(model))
    attempts = max(1, min(tries, _TRIED // max(len(items.row), 1)))
    staying = attempts > 1 and bool(items.there.any())
    for number in range(attempts):
        density = favoured * forward[items.row]
        if staying and number == 0:
            density = np.where(items.there, favoured * _FIRST, favoured)
        if attempts > 1:
            order = np.argsort(-density, kind="stable")
        group, layers = walk(
            order,
            items.row,
            items.stop,
            items.nbytes,
            density,
            stays,
            model,
            need,
            home,
            models.begin,
            models.cum,
            models.value,
            models.kind,
            fleet.kinds,
            fleet.amounts.copy(),
            fleet.trees.copy(),
            problem.node_devices,
        )
        values = need * models.value[models.begin[model] + layers]
        value, bonus = float(values.sum()), 0.0
        if problem.held is not None:
            still = np.where(group == home, np.minimum(layers, problem.held), 0)
            bonus = problem.margin * float(need @ models.value[models.begin[model] + still])
        if best is None or value + bonus > most * (1 + 1e-9):
            best, most = Plan(problem, group, layers, value, max(bound, value)), value + bonus
        missing = np.maximum(promised - values, 0.0)
        if value >= (1 - _NEAR) * bound or not missing.any():
            break
        if staying and number == 0:
            continue
        forward *= np.exp(missing / missing.max())
    assert best is not None
    return best


def _relax(problem: Problem, items: Items, order: I64, fleet: Fleet) -> tuple[float, F64]:
    width = problem.catalogue.width[problem.model][items.row]
    return relax(
        order, width, items.nbytes * width, items.density, fleet.chain, fleet.chain_bytes.copy()
    )


def replan(previous: Plan, need: F64, *, tries: int = 16) -> Plan:
    """Return the plan for other needs of the same replicas while the previous plan is in place."""
    asked = replace(previous.problem, need=need, home=previous.group, held=previous.layers)
    return plan(asked, tries=tries)


def _counted(problem: Problem, fleet: Fleet) -> Bools:
    """Return which replicas the bound counts: of each model at most as many as it has groups."""
    groups = fleet.kinds[problem.catalogue.kind, 1]
    counted = np.ones(len(problem.model), dtype=np.bool_)
    replicas = np.bincount(problem.model, minlength=len(groups))
    for model in np.flatnonzero(replicas > groups):
        rows = np.flatnonzero(problem.model == model)
        by_need = rows[np.argsort(-problem.need[rows], kind="stable")]
        counted[by_need[groups[model] :]] = False
    return counted
