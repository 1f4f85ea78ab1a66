"""Make the arrays of the residency planner's loops from those of a problem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from warmserve_rt.policy._arrays import F64, I64
from warmserve_rt.policy._hulls import hulls

from .greedy import AVAILABLE, COUNT, FIRST, LEAVES, LEFT, RESERVED, WIDTH, Items


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of the models' concave hulls.

    Those of model m are ``begin[m]:begin[m+1]``. Each goes from ``start`` to ``stop`` layers, and
    has ``nbytes`` bytes on each device and ``density``, a value per start and byte (of all
    devices).
    """

    begin: I64
    start: I64
    stop: I64
    nbytes: F64
    density: F64

    @classmethod
    def of(cls, begin: I64, cum: I64, value: F64, width: I64, room: F64) -> Segments:
        """Return the segments over the points with at most ``room`` [m] bytes on each device."""
        knots, ends = hulls(begin, cum, value, room)
        counts = np.diff(ends)
        inner = np.ones(len(knots), dtype=np.bool_)
        inner[ends[:-1]] = False  # no segment ends at a model's first corner
        stop = np.flatnonzero(inner)
        model = np.repeat(np.arange(len(counts)), counts - 1)
        low, high = begin[model] + knots[stop - 1], begin[model] + knots[stop]
        nbytes = (cum[high] - cum[low]).astype(np.float64)
        density = (value[high] - value[low]) / (nbytes * width[model])
        steps = ends - np.arange(len(ends))
        return cls(steps, knots[stop - 1], knots[stop], nbytes, density)


def make_items(
    segments: Segments, begin: I64, cum: I64, model: I64, need: F64, home: I64, held: I64 | None
) -> Items:
    """Return the items, those of one row in order, so that a stable sort by density keeps it."""
    count = np.diff(segments.begin)[model]
    count[need == 0] = 0
    row = np.repeat(np.arange(len(model)), count)
    ends = np.cumsum(count)
    segment = np.arange(len(row)) + np.repeat(segments.begin[model] - ends + count, count)
    start, stop, nbytes = segments.start[segment], segments.stop[segment], segments.nbytes[segment]
    density = need[row] * segments.density[segment]
    if held is None:
        return Items(row, stop, nbytes, density, np.zeros(len(row), dtype=np.bool_))
    here = np.where(home >= 0, held, 0)[row]
    cut = np.flatnonzero((start < here) & (here < stop))
    if len(cut):
        before = cum[begin[model[row[cut]]] + here[cut]] - cum[begin[model[row[cut]]] + start[cut]]
        nbytes[cut] -= before
        # Each cut-off part is inserted before the rest of its segment.
        row, density = np.insert(row, cut, row[cut]), np.insert(density, cut, density[cut])
        stop, nbytes = np.insert(stop, cut, here[cut]), np.insert(nbytes, cut, before)
        here = np.insert(here, cut, here[cut])
    return Items(row, stop, nbytes, density, stop <= here)


@dataclass(frozen=True, eq=False)
class Groups:
    """Devices and their groups.

    :class:`.greedy.Forest` describes ``kinds``, ``amounts`` and ``trees``.
    ``room`` [K]: the largest number of bytes that any group of the kind has on each device.
    ``chain``: widths each of which divides the next. ``chain_bytes``: for each width of the chain,
    the most bytes that replicas of its multiples can take together.
    """

    kinds: I64
    amounts: F64
    trees: F64
    room: F64
    chain: I64
    chain_bytes: F64

    @classmethod
    def of(cls, capacity: I64, availability: F64 | None, node: int, widths: I64) -> Groups:
        amounts = np.zeros((3, len(capacity)))
        amounts[LEFT] = capacity
        amounts[AVAILABLE] = 1 if availability is None else availability
        kinds = np.zeros((len(widths), 4), dtype=np.int64)
        room, nodes = np.zeros(len(widths)), 0
        chain: list[int] = []
        chain_bytes: list[float] = []
        for kind, width in enumerate(widths.tolist()):
            least = _group_least(amounts[LEFT], node, width)
            leaves = 1 << max(len(least) - 1, 0).bit_length()
            kinds[kind, [WIDTH, COUNT, LEAVES, FIRST]] = width, len(least), leaves, nodes
            nodes += 2 * leaves
            room[kind] = least.max(initial=0)
            if not chain or width % chain[-1] == 0:
                chain.append(width)
                chain_bytes.append(width * least.sum())
        trees = np.full((3, nodes), -np.inf)
        return cls(kinds, amounts, trees, room, np.array(chain), np.array(chain_bytes))

    def reserve(self, row: I64, nbytes: F64, home: I64, width: I64) -> None:
        """Reserve bytes on the home devices of these rows."""
        places = self.amounts.shape[1] + 1
        edges = np.bincount(home[row], nbytes, places)
        edges -= np.bincount(home[row] + width[row], nbytes, places)
        self.amounts[RESERVED] = np.cumsum(edges)[:-1]


def _group_least(capacity: F64, node: int, width: int) -> F64:
    """Return the minimum of each aligned group. The last node may be smaller than the others."""
    full = len(capacity) // node * node
    used = node // width * width
    nodes = capacity[:full].reshape(-1, node)[:, :used].reshape(-1, width)
    last = capacity[full : full + (len(capacity) - full) // width * width].reshape(-1, width)
    least: F64 = np.concatenate((nodes, last)).min(axis=1, initial=np.inf)
    return least
