"""Describe in sentences which layers a plan keeps, why, and what they displace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._arrays import F64
from .curve import ValueCurve

if TYPE_CHECKING:  # importing it imports numba
    from .improve import Copy


def explain(
    curves: Sequence[ValueCurve], need: F64, before: Sequence[Copy], after: Sequence[Copy]
) -> list[str]:
    """Describe a plan: one sentence for each group that gains layers, and one for each model that
    is needed and held nowhere.

    Parameters
    ----------
    curves
        The value curves of the models.
    need
        Expected starts [models].
    before, after
        The copies before the plan, and those of the plan.
    """
    layers_before = {(copy.model, copy.first): copy.layers for copy in before}
    layers_after = {(copy.model, copy.first): copy.layers for copy in after}
    said = []
    for copy in after:
        if copy.layers <= layers_before.get((copy.model, copy.first), 0):
            continue
        mine = range(copy.first, copy.first + curves[copy.model].width)
        gone = [
            (curves[other.model], other.layers - layers_after.get((other.model, other.first), 0))
            for other in before
            if other.layers > layers_after.get((other.model, other.first), 0)
            and other.first < mine.stop
            and other.first + curves[other.model].width > mine.start
        ]
        starts = float(need[copy.model]) * copy.use
        said.append(sentence(curves[copy.model], starts, copy.layers, copy.first, gone))
    nowhere = set(range(len(curves))) - {copy.model for copy in after}
    said += [
        sentence(curves[model], float(need[model]), 0, 0, ())
        for model in sorted(nowhere)
        if need[model] > 0
    ]
    return said


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
            f"keeps nothing of {curve.name}: {starts}, its first layers would save "
            f"{most:.2g} ms per MB"
        )
    nbytes = int(curve.cumulative[layers]) * curve.width
    saved = 1e9 * need * float(curve.value[layers]) / nbytes
    devices = (
        f"device {first}" if curve.width == 1 else f"devices {first}-{first + curve.width - 1}"
    )
    said = (
        f"keeps {layers} of {len(curve.nbytes)} layers of {curve.name} on {devices}: "
        f"{starts}, {saved:.2g} ms saved per MB"
    )
    lost = [f"{layers} layers of {other.name}" for other, layers in gone]
    return said + ("; evicts " + ", ".join(lost) if lost else "")
