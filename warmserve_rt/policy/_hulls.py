"""Compute the concave hulls of value curves, in compiled code."""

from __future__ import annotations

import numpy as np

from ._arrays import F64, I64
from ._compiled import jit, jit_inner

_SAME = 1e-9  # relative: slopes that differ by less count as equal; the difference is rounding


@jit_inner
def upper_hull(cum: I64, value: F64, out: I64) -> int:
    """Write the corners of the least concave function above the points to ``out``, as indices.
    Return their number.

    The function ends where the value first reaches its maximum. Equal slopes are merged.
    """
    last = len(cum) - 1
    top = value[last] * (1 - 1e-12)
    while last > 0 and value[last - 1] >= top:
        last -= 1
    count = 0
    for k in range(last + 1):
        while count >= 2:
            a, b = out[count - 2], out[count - 1]
            before = (value[b] - value[a]) / (cum[b] - cum[a])
            after = (value[k] - value[b]) / (cum[k] - cum[b])
            if before > after * (1 + _SAME):
                break
            count -= 1
        out[count] = k
        count += 1
    return count


@jit
def hulls(begin: I64, cum: I64, value: F64, room: F64) -> tuple[I64, I64]:
    """Return the corners of every model's hull over the points with at most ``room`` bytes.

    The first array has the corners as numbers of layers, one model after another; the second has
    the index at which each model's corners begin.
    """
    knots, ends = np.empty(len(cum), np.int64), np.zeros(len(begin), np.int64)
    for m in range(len(begin) - 1):
        lo, hi, at = begin[m], begin[m + 1], ends[m]
        while cum[hi - 1] > room[m]:
            hi -= 1
        ends[m + 1] = at + upper_hull(cum[lo:hi], value[lo:hi], knots[at:])
    return knots[: ends[-1]].copy(), ends
