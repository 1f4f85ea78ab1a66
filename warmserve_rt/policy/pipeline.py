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
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Seconds: TypeAlias = Sequence[float] | npt.NDArray[np.float64]

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


def first_token_by_prefix(loads: Seconds, computes: Seconds) -> Floats:
    """Return ``first_token`` for 0, 1, ..., L resident leading layers.

    The L+1 seconds never increase.
    Takes O(L): with P the running sum of ``loads``, A_j is P[j+1] - P[k], so that one running
    maximum from the end serves every k.
    """
    load, compute = _checked(loads, computes)
    before = np.concatenate(([0.0], np.cumsum(load)))
    rest = _rest(compute)
    latest = np.maximum.accumulate((before[1:] + rest[:-1])[::-1])[::-1]
    times = np.full(len(load) + 1, rest[0])
    times[:-1] = np.maximum(times[:-1], latest - before[:-1])
    # Each difference is rounded by itself; the exact times never increase.
    return np.minimum.accumulate(times)


def floor_layers(loads: Seconds, computes: Seconds, budget_s: float) -> int | None:
    """Return the smallest number of leading layers with which the first token is within
    ``budget_s`` seconds, or None if even a start with all layers resident takes longer.
    """
    times = first_token_by_prefix(loads, computes)
    return fewest(times, budget_s, float(np.sum(loads)))


def fewest(times: Floats, budget_s: float, loading_s: float) -> int | None:
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


def knee(loads: Seconds, computes: Seconds) -> int:
    """Return the smallest number of leading layers with which a start is as fast as with all."""
    found = floor_layers(loads, computes, float(np.sum(computes)))
    assert found is not None  # with all layers the first token takes exactly the sum
    return found


def uniform_first_token(layers: int, load_s: float, compute_s: float, resident: int) -> float:
    """Return ``first_token`` for L equal layers in closed form.

    It is the largest of L c, of (L-k) l + c, and of l + (L-k) c. The last one decides if loading is
    faster than computing and no computation hides the load of the first missing layer.

    Raises
    ------
    ValueError
        As ``first_token`` does.
    """
    _checked([load_s], [compute_s])
    if layers < 1 or not 0 <= resident <= layers:
        raise ValueError(f"the number of resident layers must be in [0, {layers}], got {resident}")
    warm = layers * compute_s
    missing = layers - resident
    if missing == 0:
        return warm
    return max(warm, missing * load_s + compute_s, load_s + missing * compute_s)


def uniform_floor(layers: int, load_s: float, compute_s: float, extra_s: float = 0.0) -> int:
    """Return the smallest number of leading layers, of L equal ones, with which the first token is
    at most D = ``extra_s`` seconds later than with all layers.

    It is k_D = ceil(L - ((L-1) c + D) / l), but at least 1 if one layer takes longer than D to
    load, because no computation hides the load of the first layer. With D = 0 it is the knee, k*.

    Raises
    ------
    ValueError
        If a time is negative or not finite, or ``layers`` is less than 1.
    """
    _checked([load_s, extra_s], [compute_s, 0.0])
    if layers < 1:
        raise ValueError(f"the number of layers must be at least 1, got {layers}")
    if load_s == 0:
        return 0
    exact = layers - ((layers - 1) * compute_s + extra_s) / load_s
    return max(int(load_s > extra_s), math.ceil(exact - _ROUNDING * (layers + abs(exact))))


def _rest(compute: Floats) -> Floats:
    """Return the seconds of computing from layer j on [L+1]; the last is 0."""
    return np.concatenate((np.cumsum(compute[::-1])[::-1], [0.0]))


def _checked(loads: Seconds, computes: Seconds) -> tuple[Floats, Floats]:
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
