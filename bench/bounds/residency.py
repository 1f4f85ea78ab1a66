"""Plan from nothing which leading layers of which replica to hold on which device group, and bound
what any plan can reach.

The scheduler does not use this planner: it improves on what devices hold, one exchange at a time.
The benches compare its results with the bound. As a scheduler's first plan on empty devices, this
plan had fewer late starts with 24 models, more with 40, and a longer tail with ServeGen's.

The value of a layer is the expected number of starts before the next plan times the seconds that
the layer saves at each. With the concave hull of every replica's
:class:`~warmserve_rt.policy.curve.ValueCurve` this is a knapsack problem. A greedy algorithm takes
segments by value per byte, and the linear relaxation bounds the distance from the best plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from warmserve_rt.policy._arrays import F64, I64, Bools

from .greedy import COUNT, Forest, Items, Points, Replicas, relax, walk
from .items import Groups, Segments, make_items
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
    plan saves more.
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
    groups = Groups.of(problem.capacity, problem.availability, problem.node_devices, models.widths)
    segments, room = models.segments, groups.room[models.kind]
    if (models.cum[models.begin[1:] - 1] > room).any():
        segments = Segments.of(models.begin, models.cum, models.value, models.width, room)
    items = make_items(segments, models.begin, models.cum, model, need, home, problem.held)

    counted = _counted(problem, groups)
    order = np.argsort(-items.density, kind="stable")
    bound, share = _relax(problem, items, order[counted[items.row[order]]], groups)
    favoured = items.density
    if items.there.any():
        favoured = np.where(items.there, favoured * (1 + problem.margin), favoured)
        order = np.argsort(-favoured, kind="stable")
        _, share = _relax(problem, items, order[counted[items.row[order]]], groups)
    stays = items.there & (share > 0.5)
    groups.reserve(items.row[stays], items.nbytes[stays], home, models.width[model])

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
            density,
            stays,
            items,
            Replicas(model, need, home),
            Points(models.begin, models.cum, models.value, models.kind),
            Forest(groups.kinds, groups.amounts.copy(), groups.trees.copy(), problem.node_devices),
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


def _relax(problem: Problem, items: Items, order: I64, groups: Groups) -> tuple[float, F64]:
    width = problem.catalogue.width[problem.model][items.row]
    return relax(
        order, width, items.nbytes * width, items.density, groups.chain, groups.chain_bytes.copy()
    )


def replan(previous: Plan, need: F64, *, tries: int = 16) -> Plan:
    """Return the plan for other needs of the same replicas while the previous plan is in place."""
    asked = replace(previous.problem, need=need, home=previous.group, held=previous.layers)
    return plan(asked, tries=tries)


def _counted(problem: Problem, groups: Groups) -> Bools:
    """Return which replicas the bound counts: of each model at most as many as it has groups."""
    most = groups.kinds[problem.catalogue.kind, COUNT]
    counted = np.ones(len(problem.model), dtype=np.bool_)
    replicas = np.bincount(problem.model, minlength=len(most))
    for model in np.flatnonzero(replicas > most):
        rows = np.flatnonzero(problem.model == model)
        by_need = rows[np.argsort(-problem.need[rows], kind="stable")]
        counted[by_need[most[model] :]] = False
    return counted
