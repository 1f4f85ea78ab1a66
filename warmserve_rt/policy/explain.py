"""Describe in a sentence which layers a copy of a model keeps, why, and what it displaces."""

from __future__ import annotations

from collections.abc import Sequence

from .curve import ValueCurve


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
