"""Compute the time to the first token while some layers are still being loaded.

From the start on, missing layers arrive one after another over one link, in the order of
execution. Prefill computes a layer when it is resident and the layer before it is done. Let layer i
take ``l_i`` seconds to arrive and ``c_i`` seconds to compute. Missing layer j then arrives at
``A_j``, the sum of ``l_i`` over the missing layers up to and including j. Unrolling
``done_i = max(done_{i-1}, A_i) + c_i`` gives

    first token = max( sum of all c_i,  max over missing j of (A_j + sum over i >= j of c_i) )

which follows from that recurrence alone. Two times count as equal if they differ by rounding only,
that is by at most 1e-12 of the time of loading and computing everything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TypeAlias

import numpy as np

from ._arrays import F64

Seconds: TypeAlias = Sequence[float] | F64

_ROUNDING = 1e-12


def first_token(loads: Seconds, computes: Seconds, resident: int | Collection[int]) -> float:
    """Return the seconds from the start to the first token.

    Parameters
    ----------
    loads, computes
        Seconds to load and to compute each layer, in execution order.
    resident
        The number of leading layers that are resident at the start, or the indices of the resident
        layers.

    Raises
    ------
    ValueError
        If a time is negative or not finite, if the lengths differ, or if a layer does not exist.
    """
    load, compute = _checked(loads, computes)
    missing = np.ones(len(load), dtype=bool)
    if isinstance(resident, int):
        if not 0 <= resident <= len(load):
            raise ValueError(
                f"the number of resident layers must be in [0, {len(load)}], got {resident}"
            )
        missing[:resident] = False
    else:
        if any(not 0 <= layer < len(load) for layer in resident):
            raise ValueError(
                f"resident layers must be indices below {len(load)}, got {sorted(resident)}"
            )
        missing[list(resident)] = False
    arrivals = np.cumsum(np.where(missing, load, 0.0))
    rest = _rest(compute)
    return float(np.max(np.where(missing, arrivals + rest[:-1], 0.0), initial=rest[0]))


def first_token_by_prefix(loads: Seconds, computes: Seconds, faster: Seconds | None = None) -> F64:
    """Return the seconds to the first token if the 0, 1, ..., L leading layers load faster.

    The L+1 seconds never increase.
    Takes O(L). With F and P the running sums of ``faster`` and ``loads``, A_j is F[j+1] for the k
    leading layers, and F[k] + P[j+1] - P[k] for the others. One running maximum from the beginning
    and one from the end therefore serve every k.

    Parameters
    ----------
    loads, computes
        Seconds to load and to compute each layer, in execution order.
    faster
        Seconds to load each layer if it is one of the leading layers; at most those of ``loads``.
        By default these layers are resident.

    Raises
    ------
    ValueError
        If a time is negative or not finite, if the lengths differ, or if ``faster`` is slower.
    """
    load, compute = _checked(loads, computes)
    fast = np.zeros(len(load)) if faster is None else _checked(faster, compute)[0]
    if (fast > load).any():
        raise ValueError(
            f"layers must not load slower than in {load.tolist()}, got {fast.tolist()}"
        )
    ahead = np.concatenate(([0.0], np.cumsum(fast)))
    before = np.concatenate(([0.0], np.cumsum(load)))
    rest = _rest(compute)
    times = np.full(len(load) + 1, rest[0])
    times[1:] = np.maximum(times[1:], np.maximum.accumulate(ahead[1:] + rest[:-1]))
    latest = np.maximum.accumulate((before[1:] + rest[:-1])[::-1])[::-1]
    times[:-1] = np.maximum(times[:-1], latest - before[:-1] + ahead[:-1])
    # Each difference is rounded by itself; the exact times never increase.
    return np.minimum.accumulate(times)


def fewest(times: F64, budget_s: float, loading_s: float) -> int | None:
    """Return the first index of ``times`` that is within the budget, or None.

    Parameters
    ----------
    times
        L+1 seconds, never increasing.
    budget_s
        The budget in seconds; may be infinite.
    loading_s
        Seconds to load all layers, for the tolerance.

    Raises
    ------
    ValueError
        If the budget is NaN.
    """
    if math.isnan(budget_s):
        raise ValueError("the budget must be a number of seconds, got NaN")
    bound = budget_s + _ROUNDING * (loading_s + float(times[-1]))
    if times[-1] > bound:
        return None
    return int(np.argmax(times <= bound))


def _rest(compute: F64) -> F64:
    """Return the seconds of computing from layer j on [L+1]; the last is 0."""
    return np.concatenate((np.cumsum(compute[::-1])[::-1], [0.0]))


def _checked(loads: Seconds, computes: Seconds) -> tuple[F64, F64]:
    load = np.asarray(loads, dtype=np.float64)
    compute = np.asarray(computes, dtype=np.float64)
    if load.ndim != 1 or load.shape != compute.shape or not len(load):
        raise ValueError(
            "loads and computes must have one entry for each layer, "
            f"got shapes {load.shape} and {compute.shape}"
        )
    for name, times in (("load", load), ("compute", compute)):
        if not (np.isfinite(times).all() and (times >= 0).all()):
            raise ValueError(f"{name} times must be finite and not negative, got {times.tolist()}")
    return load, compute
