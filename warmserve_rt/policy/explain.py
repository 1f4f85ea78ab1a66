"""Describe a plan in sentences: what each replica keeps and why, and what it displaces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .curve import ValueCurve
from .residency import Plan


def explain(plan: Plan, row: int) -> str:
    """Return one sentence about a replica of a plan.

    The sentence names the layers that the replica keeps and their devices, the starts that it is
    expected to serve, the seconds saved per byte, and the layers that the plan evicts from its
    devices (compared with ``home`` and ``held`` of the problem).

    Raises
    ------
    IndexError
        If the plan has no such row.
    """
    problem = plan.problem
    curves, model = problem.catalogue.curves, problem.model
    gone = [(curves[model[other]], _loss(plan, other)) for other in _losers(plan, row)]
    layers, group = int(plan.layers[row]), int(plan.group[row])
    return sentence(curves[model[row]], float(problem.need[row]), layers, group, gone)


def sentence(
    curve: ValueCurve, need: float, layers: int, first: int, gone: Sequence[tuple[ValueCurve, int]]
) -> str:
    """Return one sentence about a copy of a model.

    Parameters
    ----------
    curve
        The value curve of the model.
    need
        The starts that the copy is expected to serve.
    layers
        The number of layers that it keeps; 0 if it keeps none.
    first
        The first device of its group.
    gone
        The models that lose layers to it, with the number of layers lost.
    """
    starts = f"{need:.2g} expected starts"
    if layers == 0:
        most = 1e9 * need * float(curve.density[0])
        return (
            f"keeps nothing of {curve.name}: {starts}, its first {curve.unit}s would save "
            f"{most:.2g} ms per MB"
        )
    nbytes = int(curve.cumulative[layers]) * curve.width
    saved = 1e9 * need * float(curve.value[layers]) / nbytes
    devices = (
        f"device {first}" if curve.width == 1 else f"devices {first}-{first + curve.width - 1}"
    )
    said = (
        f"keeps {layers} of {len(curve.nbytes)} {curve.unit}s of {curve.name} on {devices}: "
        f"{starts}, {saved:.2g} ms saved per MB"
    )
    lost = [f"{layers} {other.unit}s of {other.name}" for other, layers in gone]
    return said + ("; evicts " + ", ".join(lost) if lost else "")


def _losers(plan: Plan, row: int) -> list[int]:
    """Return the replicas that lose layers on devices of this replica's group."""
    problem = plan.problem
    if problem.home is None or problem.held is None:
        return []
    width = problem.catalogue.width[problem.model]
    begin, end = plan.group[row], plan.group[row] + width[row]
    overlap = (problem.home >= 0) & (problem.home < end) & (problem.home + width > begin)
    less = (plan.group != problem.home) | (plan.layers < problem.held)
    losers = overlap & less & (problem.held > 0)
    losers[row] = False
    return [int(other) for other in np.flatnonzero(losers)]


def _loss(plan: Plan, row: int) -> int:
    """Return the number of layers that the replica loses."""
    problem = plan.problem
    assert problem.home is not None
    assert problem.held is not None
    stays = int(plan.layers[row]) if plan.group[row] == problem.home[row] else 0
    return int(problem.held[row]) - stays
