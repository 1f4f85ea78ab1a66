"""Improve on the layers that are held, one exchange at a time.

A layer that is held gives way only to layers that are worth clearly more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._arrays import F64
from ._exchange import Copies, Models, exchange
from .curve import ValueCurve


@dataclass(frozen=True)
class Copy:
    """Leading layers of a model on the group of devices that begins with device ``first``.

    ``fixed``: whether an instance uses them, so that none may be evicted. ``use``: the probability
    that a start of the model uses this copy.
    """

    model: int
    first: int
    layers: int
    fixed: bool = False
    use: float = 0.0


class Curves:
    """The value curves of all models, as arrays."""

    def __init__(self, curves: Sequence[ValueCurve]) -> None:
        self.begin = np.cumsum([0, *(len(c.value) for c in curves)])
        # The empty list is for a fleet without models: concatenate needs at least one array.
        self.cum = np.concatenate([[], *(c.cumulative for c in curves)]).astype(np.float64)
        self.value = np.concatenate([[], *(c.value for c in curves)])
        self.stop = np.cumsum([0, *(len(c.stops) for c in curves)])
        none = np.zeros(0, np.int64)
        self.stops = np.concatenate([none, *(c.stops for c in curves)])
        self.width = np.array([c.width for c in curves], np.int64)
        self._sizes = [c.cumulative.tolist() for c in curves]

    def nbytes(self, model: int, layers: int) -> float:
        """Return the bytes of a model's leading layers on each device."""
        return float(self._sizes[model][layers])


def improve(
    curves: Curves,
    need: F64,
    copies: Sequence[Copy],
    free: F64,
    available: F64,
    node: int,
    *,
    margin: float,
    most: int = 6,
    moves: int = 16,
) -> list[Copy]:
    """Return the copies to hold in place of ``copies``.

    Parameters
    ----------
    curves
        The value curves of the models.
    need
        Expected starts [models].
    copies
        The copies that are held now.
    free
        Free bytes beside the copies [devices]. Changed: bytes that the result takes are subtracted.
    available
        The probability, 0 to 1, that a start can use the device [devices].
    node
        The number of devices of a node. A group lies within one node.
    margin
        An exchange must gain more than ``1 + margin`` times the value that it displaces.
    most
        The largest number of groups that hold one model.
    moves
        The largest number of exchanges.
    """
    room = len(copies) + moves
    model = np.full(room, -1)
    first, layers = np.zeros(room, np.int64), np.zeros(room, np.int64)
    fixed, before = np.zeros(room, np.int64), np.zeros(room, np.int64)
    use = np.zeros(room)
    for i, copy in enumerate(copies):
        model[i], first[i], layers[i], fixed[i] = copy.model, copy.first, copy.layers, copy.fixed
    models = Models(
        curves.begin, curves.cum, curves.value, curves.stop, curves.stops, curves.width, need
    )
    state = Copies(model, first, layers, fixed, use, before)
    exchange(models, state, free, available, node, margin, most, moves)
    return [
        Copy(int(model[i]), int(first[i]), int(layers[i]), bool(fixed[i]), use=float(use[i]))
        for i in np.flatnonzero(model >= 0)
    ]
