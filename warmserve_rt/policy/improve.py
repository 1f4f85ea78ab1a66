"""Improve on the layers that are held, one exchange at a time.

A layer that is held gives way only to layers that are worth clearly more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._arrays import F64
from ._copies import Copies, Devices, Models
from ._exchange import exchange
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
    rows = len(copies) + moves
    model = np.full(rows, -1)
    first, layers, fixed = (np.zeros(rows, np.int64) for _ in range(3))
    use = np.zeros(rows)
    on_device = np.zeros(len(free) + 1, np.int64)  # the changes of their number along the devices
    for i, copy in enumerate(copies):
        model[i], first[i], layers[i], fixed[i] = copy.model, copy.first, copy.layers, copy.fixed
        on_device[copy.first] += 1
        on_device[copy.first + curves.width[copy.model]] -= 1
    models = Models(
        curves.begin, curves.cum, curves.value, curves.stop, curves.stops, curves.width, need
    )
    state = Copies(
        model,
        first,
        layers,
        fixed,
        use,
        before=np.zeros(rows, np.int64),
        cheapest=np.full(rows, np.inf),
        next=np.full(rows, -1),
        head=np.full(len(curves.width), -1),
        slot=np.full(rows, -1),
    )
    most_on_one = int(np.cumsum(on_device).max(initial=0))
    devices = Devices(
        free,
        available,
        rows=np.zeros((len(free), most_on_one + moves), np.int64),
        filled=np.zeros(len(free), np.int64),
        cheapest=np.full(len(free), np.inf),
        changed=np.zeros(len(free), np.int64),
    )
    exchange(models, state, devices, node, margin, most, moves)
    return [
        Copy(int(model[i]), int(first[i]), int(layers[i]), bool(fixed[i]), use=float(use[i]))
        for i in np.flatnonzero(model >= 0)
    ]
