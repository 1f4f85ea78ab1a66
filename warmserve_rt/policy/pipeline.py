"""Time to the first token while a part of the layers is still on its way.

Layers arrive one after another over one link, in the order of execution, from the moment of the
start; prefill computes a layer once it is there and the layer before it is done. With ``l_i``
the seconds that layer i takes to arrive and ``c_i`` those it takes to compute, missing layer j
arrives at ``A_j``, the sum of ``l_i`` over the missing layers up to and with j. Unrolling
``done_i = max(done_{i-1}, A_i) + c_i`` gives

    first token = max( sum of all c_i,  max over missing j of (A_j + sum over i >= j of c_i) )

which needs no source but that recurrence. Two times count as equal that differ by less than
rounding: 1e-12 of the time of loading and computing everything.
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
    """Seconds from the start to the first token.

    ``loads`` and ``computes``: seconds of each layer, in execution order. ``resident``: how many
    leading layers are there at the start, or the indices of those that are. Raises ValueError for
    times that are negative or not finite, lengths that differ, and layers that do not exist.
    """
    load, compute = _checked(loads, computes)
    missing = np.ones(len(load), dtype=bool)
    if isinstance(resident, int):
        if not 0 <= resident <= len(load):
            raise ValueError(f"{resident} resident layers of {len(load)}")
        missing[:resident] = False
    else:
        if any(not 0 <= layer < len(load) for layer in resident):
            raise ValueError(f"resident layers {sorted(resident)} of {len(load)}")
        missing[list(resident)] = False
    arrivals = np.cumsum(np.where(missing, load, 0.0))
    rest = _rest(compute)
    return float(np.max(np.where(missing, arrivals + rest[:-1], 0.0), initial=rest[0]))


def first_token_by_prefix(loads: Seconds, computes: Seconds) -> Floats:
    """``first_token`` for 0, 1, ..., L resident leading layers: L+1 seconds, never increasing.

    In O(L): with P the running sum of ``loads``, A_j is P[j+1] - P[k], so one running maximum from
    the end serves every k.
    """
    load, compute = _checked(loads, computes)
    before = np.concatenate(([0.0], np.cumsum(load)))
    rest = _rest(compute)
    latest = np.maximum.accumulate((before[1:] + rest[:-1])[::-1])[::-1]
    times = np.full(len(load) + 1, rest[0])
    times[:-1] = np.maximum(times[:-1], latest - before[:-1])
    # The differences are rounded one by one: keep what is true of the exact ones.
    return np.minimum.accumulate(times)


def floor_layers(loads: Seconds, computes: Seconds, budget_s: float) -> int | None:
    """The fewest leading layers with which the first token comes within ``budget_s`` seconds.

    None where even a start with every layer resident is later.
    """
    times = first_token_by_prefix(loads, computes)
    return fewest(times, budget_s, float(np.sum(loads)))


def fewest(times: Floats, budget_s: float, loading_s: float) -> int | None:
    """The first index of ``times`` (never increasing, L+1 seconds) within the budget, or None.

    ``loading_s``: of all layers, for the tolerance. Raises ValueError for a budget that is NaN.
    """
    if math.isnan(budget_s):
        raise ValueError("the budget is not a number of seconds")
    bound = budget_s + _ROUNDING * (loading_s + float(times[-1]))
    if times[-1] > bound:
        return None
    return int(np.argmax(times <= bound))


def knee(loads: Seconds, computes: Seconds) -> int:
    """The fewest leading layers with which a start is as fast as with all of them."""
    found = floor_layers(loads, computes, float(np.sum(computes)))
    assert found is not None  # with every layer it is exactly the sum
    return found


def uniform_first_token(layers: int, load_s: float, compute_s: float, resident: int) -> float:
    """The closed form for L equal layers: L c, or (L-k) l + c where that is more, or
    l + (L-k) c where loading is the faster of the two and nothing hides the first missing layer.

    Raises ValueError as ``first_token`` does.
    """
    _checked([load_s], [compute_s])
    if layers < 1 or not 0 <= resident <= layers:
        raise ValueError(f"{resident} resident layers of {layers}")
    warm = layers * compute_s
    missing = layers - resident
    if missing == 0:
        return warm
    return max(warm, missing * load_s + compute_s, load_s + missing * compute_s)


def uniform_floor(layers: int, load_s: float, compute_s: float, extra_s: float = 0.0) -> int:
    """The fewest leading layers of L equal ones with which the first token is at most ``extra_s``
    later than with all: k_D = ceil(L - ((L-1) c + D) / l), but never 0 where the first layer alone
    takes longer than D to load, for nothing hides it. With ``extra_s`` 0 it is the knee, k*.

    Raises ValueError for times that are negative or not finite.
    """
    _checked([load_s, extra_s], [compute_s, 0.0])
    if layers < 1:
        raise ValueError(f"{layers} layers")
    if load_s == 0:
        return 0
    exact = layers - ((layers - 1) * compute_s + extra_s) / load_s
    return max(int(load_s > extra_s), math.ceil(exact - _ROUNDING * (layers + abs(exact))))


def _rest(compute: Floats) -> Floats:
    """Seconds of computing from layer j on: L+1 of them, the last 0."""
    return np.concatenate((np.cumsum(compute[::-1])[::-1], [0.0]))


def _checked(loads: Seconds, computes: Seconds) -> tuple[Floats, Floats]:
    load = np.asarray(loads, dtype=np.float64)
    compute = np.asarray(computes, dtype=np.float64)
    if load.ndim != 1 or load.shape != compute.shape or not len(load):
        raise ValueError(
            f"loads of shape {load.shape} and computes of shape {compute.shape}: one each a layer"
        )
    for name, times in (("load", load), ("compute", compute)):
        if not (np.isfinite(times).all() and (times >= 0).all()):
            raise ValueError(f"{name} times are finite and not negative: {times.tolist()}")
    return load, compute
