"""From what is held to something better, one exchange at a time: a plan that keeps what it has
unless something else is worth clearly more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._exchange import Copies, Models, exchange
from ._greedy import F64
from .curve import ValueCurve


@dataclass(frozen=True)
class Copy:
    """Leading layers of a model on the group of devices from ``first`` on. ``fixed``: an instance
    has them, and none can go. ``use``: the probability that a start is there."""

    model: int
    first: int
    layers: int
    fixed: bool = False
    use: float = 0.0


class Curves:
    """The value curves of all models, as arrays."""

    def __init__(self, curves: Sequence[ValueCurve]) -> None:
        self.begin = np.cumsum([0, *(len(c.value) for c in curves)])
        # Without models there is nothing to concatenate.
        self.cum = np.concatenate([[], *(c.cumulative for c in curves)]).astype(np.float64)
        self.value = np.concatenate([[], *(c.value for c in curves)])
        self.stop = np.cumsum([0, *(len(c.stops) for c in curves)])
        none = np.zeros(0, np.int64)
        self.stops = np.concatenate([none, *(c.stops for c in curves)])
        self.width = np.array([c.width for c in curves], np.int64)
        self._sizes = [c.cumulative.tolist() for c in curves]

    def nbytes(self, model: int, layers: int) -> float:
        """Of its leading layers, on each device."""
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
    """What should be held in place of ``copies``, after at most ``moves`` exchanges.

    ``need`` [models]: expected starts. ``free`` [devices]: bytes beside the copies; what is taken
    of them is taken from this array. ``available`` [devices], 0 to 1: whether a start could be
    there. Groups lie within nodes of ``node`` devices. What comes is worth more than
    ``1 + margin`` times what goes for it. ``most``: groups that hold a model.
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
