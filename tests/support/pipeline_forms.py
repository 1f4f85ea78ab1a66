"""Closed forms of the time to the first token, against which policy/pipeline.py is checked."""

from __future__ import annotations

import math

import numpy as np

from warmserve_rt.policy.pipeline import Seconds, fewest, first_token_by_prefix

_ROUNDING = 1e-12


def floor_layers(loads: Seconds, computes: Seconds, budget_s: float) -> int | None:
    """Return the smallest number of leading layers with which the first token is within
    ``budget_s`` seconds, or None if even a start with all layers resident takes longer.
    """
    times = first_token_by_prefix(loads, computes)
    return fewest(times, budget_s, float(np.sum(loads)))


def knee(loads: Seconds, computes: Seconds) -> int:
    """Return the smallest number of leading layers with which a start is as fast as with all."""
    found = floor_layers(loads, computes, float(np.sum(computes)))
    assert found is not None  # with all layers the first token takes exactly the sum
    return found


def uniform_first_token(layers: int, load_s: float, compute_s: float, resident: int) -> float:
    """Return ``first_token`` for L equal layers in closed form.

    It is the largest of L c, of (L-k) l + c, and of l + (L-k) c. The last one decides if loading is
    faster than computing and no computation hides the load of the first missing layer.
    """
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
    """
    if load_s == 0:
        return 0
    exact = layers - ((layers - 1) * compute_s + extra_s) / load_s
    return max(int(load_s > extra_s), math.ceil(exact - _ROUNDING * (layers + abs(exact))))
