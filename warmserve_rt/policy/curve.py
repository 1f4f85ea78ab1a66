"""Value the first k layers of a model in a tier by the seconds that they save at its next start.

A tier is memory from which layers arrive sooner than from below it: the memory of devices, or host
memory that is filled from files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ._arrays import F64, I64
from ._hulls import hulls
from .pipeline import fewest, first_token_by_prefix
from .profile import ModelProfile

# The weight that the mean always keeps: if only floors counted, memory beyond the floors would not
# go to the layers that save most.
_TIE = 1e-3


@dataclass(frozen=True, eq=False)
class ValueCurve:
    """The value of holding the first 0, 1, ..., L layers of one model.

    Parameters
    ----------
    name
        The name of the model.
    width
        The number of devices of a group.
    nbytes
        Bytes of each layer on each device of the group [L].
    value
        Seconds saved per expected start [L+1], from 0 for no layer on, never falling.

    Raises
    ------
    ValueError
        If sizes, values or shapes are invalid.
    """

    name: str
    width: int
    nbytes: I64
    value: F64

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"{self.name}: width must be at least 1 device, got {self.width}")
        if not len(self.nbytes) or (self.nbytes < 1).any():
            raise ValueError(f"{self.name}: a model must have layers, each of at least one byte")
        if self.value.shape != (len(self.nbytes) + 1,):
            raise ValueError(
                f"{self.name}: value must have one entry more than nbytes, "
                f"got shape {self.value.shape} for {self.nbytes.shape}"
            )
        if (
            self.value[0] != 0
            or not np.isfinite(self.value).all()
            or (np.diff(self.value) < 0).any()
        ):
            raise ValueError(f"{self.name}: values must be finite, begin at 0 and never fall")

    @cached_property
    def cumulative(self) -> I64:
        """Return the bytes of the first 0, 1, ..., L layers on each device."""
        return np.concatenate(([0], np.cumsum(self.nbytes, dtype=np.int64)))

    @cached_property
    def knots(self) -> I64:
        """Return the numbers of layers at the corners of the concave hull, from 0 to the smallest
        number that is worth as much as all layers."""
        begin = np.array([0, len(self.value)])
        return hulls(begin, self.cumulative, self.value.copy(), np.full(1, np.inf))[0]

    @cached_property
    def stops(self) -> I64:
        """Return the numbers of layers at which a partially held model ends best: the next layer
        is worth less per byte there.

        They range from 0 to the smallest number that is worth as much as all layers. Stops that add
        less than 1 % of the value of all layers are dropped, except the last.
        """
        last = int(self.knots[-1])
        slope = np.diff(self.value[: last + 1]) / self.nbytes[:last]
        found, least = [0], self.value[last] / 100
        for k in range(1, last):
            falls = slope[k - 1] > slope[k] * (1 + 1e-6)
            if falls and self.value[k] - self.value[found[-1]] >= least:
                found.append(k)
        return np.array([*found, last] if last else found)

    @cached_property
    def density(self) -> F64:
        """Return for each layer [L] the slope of its segment of the hull: seconds per expected
        start and byte (of all devices). It falls, and is 0 beyond the last knot."""
        segment = np.diff(self.value[self.knots]) / np.diff(self.cumulative[self.knots])
        falling = np.zeros(len(self.nbytes))
        falling[: self.knots[-1]] = np.repeat(segment / self.width, np.diff(self.knots))
        return falling


def objective_weight(objective: float | str) -> float:
    """Return the weight of an objective: 0 for ``"mean"``, 1 for ``"slo"``, or the given weight.

    Raises
    ------
    ValueError
        If the objective is none of these.
    """
    weight = {"mean": 0.0, "slo": 1.0}.get(objective) if isinstance(objective, str) else objective
    if weight is None or not 0 <= weight <= 1:
        raise ValueError(
            f"objective must be 'mean', 'slo' or a weight in [0, 1], got {objective!r}"
        )
    return float(weight)


def value_curve(
    profile: ModelProfile,
    bandwidth: float,
    tokens: float | Sequence[float],
    *,
    budget_s: float = math.inf,
    objective: float | str = "mean",
    tier: float = math.inf,
    resident: int = 0,
) -> ValueCurve:
    """Return the value curve of a model in a tier, for starts whose layers stream in while prefill
    runs.

    With the first token T(k) of :mod:`pipeline` and the weight w of the objective (0 for the mean,
    1 for the budget), the value is

        value(k) = (1 - w) (T(0) - T(k)) + w (T(0) - T(L)) [T(k) <= budget < T(0)]

    A start within the budget therefore counts as much as all the seconds by which a start without
    the tier is later than one with all layers in it, and the two objectives share one scale. The
    mean always has at least the weight 0.001.

    Parameters
    ----------
    profile
        The costs of the model.
    bandwidth
        Bytes per second to each device.
    tokens
        Tokens of the prompt that starts the model, or a sample of prompts; the value is the mean
        over the sample.
    budget_s
        Seconds until the first token is due.
    objective
        "mean", "slo" or a weight in [0, 1] between them.
    tier
        Bytes per second to each device of the layers in the tier. By default the tier is the
        device's own memory, whose layers need no load.
    resident
        The number of leading layers that the device holds. The curve is that of the layers after
        them.

    Raises
    ------
    ValueError
        If the bandwidth, the prompts, the budget, the objective or the number of resident layers
        are invalid, or if the tier is slower than the bandwidth.
    """
    weight = min(objective_weight(objective), 1 - _TIE)
    if not 0 < bandwidth < math.inf:
        raise ValueError(
            f"{profile.name}: bandwidth must be positive and finite, got {bandwidth} bytes/s"
        )
    if not tier >= bandwidth:
        raise ValueError(
            f"{profile.name}: a tier must be at least as fast as the bandwidth of {bandwidth} "
            f"bytes/s, got {tier}"
        )
    prompts = [tokens] if isinstance(tokens, (int, float)) else list(tokens)
    if not prompts or not all(0 <= prompt < math.inf for prompt in prompts):
        raise ValueError(
            f"{profile.name}: prompts must have finite token counts of at least 0, got {tokens}"
        )
    if not 0 <= resident < len(profile.layer_bytes):
        raise ValueError(
            f"{profile.name}: resident must be layers in [0, {len(profile.layer_bytes)}), "
            f"got {resident}"
        )
    nbytes = np.array(profile.layer_bytes, dtype=np.int64)
    loads, faster = nbytes / bandwidth, nbytes / tier
    loads[:resident] = faster[:resident] = 0.0
    value = np.zeros(len(nbytes) + 1)
    for prompt in prompts:
        compute = profile.compute(profile.prefill(prompt))
        times = first_token_by_prefix(loads, compute, faster)
        value += (1 - weight) * (times[0] - times)
        floor = fewest(times, budget_s, float(loads.sum()))
        if floor is not None and floor > 0:
            value[floor:] += weight * (times[0] - times[-1])
    return ValueCurve(
        profile.name, profile.width, nbytes[resident:], value[resident:] / len(prompts)
    )
