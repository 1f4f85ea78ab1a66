"""What holding the first k layers of a model is worth at its next start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ._greedy import F64, I64, hulls
from .pipeline import Seconds, fewest, first_token_by_prefix
from .profile import ModelProfile

# Of the weight, what is always left to the mean: where floors are all that counts, memory beyond
# them should still hold what saves most.
_TIE = 1e-3


@dataclass(frozen=True, eq=False)
class ValueCurve:
    """The value of each number of held units of one model, in the order in which they are held.

    ``nbytes`` [L]: of each unit on each of the ``width`` devices. ``value`` [L+1]: seconds per
    expected start, from 0 for no unit on, never falling. ``order`` [L]: the model's index of each
    unit; layers are held from the first on, so it counts up. ``unit``: what one is called.

    Raises ValueError for sizes and values that are none.
    """

    name: str
    width: int
    nbytes: I64
    value: F64
    order: I64
    unit: str = "layer"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"{self.name}: a group of {self.width} devices")
        if not len(self.nbytes) or (self.nbytes < 1).any():
            raise ValueError(f"{self.name}: a model has {self.unit}s, and each has bytes")
        shapes = (self.value.shape, self.order.shape)
        if shapes != ((len(self.nbytes) + 1,), (len(self.nbytes),)):
            raise ValueError(
                f"{self.name}: values, order of shapes {shapes} for {self.nbytes.shape}"
            )
        if (
            self.value[0] != 0
            or not np.isfinite(self.value).all()
            or (np.diff(self.value) < 0).any()
        ):
            raise ValueError(f"{self.name}: values are finite, begin at 0 and never fall")

    @cached_property
    def cumulative(self) -> I64:
        """Bytes on each device of the first 0, 1, ..., L units."""
        return np.concatenate(([0], np.cumsum(self.nbytes, dtype=np.int64)))

    @cached_property
    def knots(self) -> I64:
        """Numbers of units at the corners of the concave hull, from 0 to the fewest that are worth
        as much as all."""
        begin = np.array([0, len(self.value)])
        return hulls(begin, self.cumulative, self.value.copy(), np.full(1, np.inf))[0]

    @cached_property
    def stops(self) -> I64:
        """Numbers of units after which the next is worth less for a byte, so that a part of the
        model ends best there: from 0 to the fewest that are worth as much as all. Of those that
        add less than a hundredth of all there is only the last."""
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
        """Of each unit [L]: seconds per expected start and byte (of all devices) of its segment of
        the hull; falling, and 0 beyond the last knot."""
        segment = np.diff(self.value[self.knots]) / np.diff(self.cumulative[self.knots])
        falling = np.zeros(len(self.nbytes))
        falling[: self.knots[-1]] = np.repeat(segment / self.width, np.diff(self.knots))
        return falling


def objective_weight(objective: float | str) -> float:
    """0 for ``"mean"``, 1 for ``"slo"``, or a weight between. Raises ValueError for others."""
    weight = {"mean": 0.0, "slo": 1.0}.get(objective) if isinstance(objective, str) else objective
    if weight is None or not 0 <= weight <= 1:
        raise ValueError(f"objective {objective!r}: 'mean', 'slo' or a weight from 0 to 1")
    return float(weight)


def value_curve(
    profile: ModelProfile,
    bandwidth: float,
    tokens: float | Sequence[float],
    *,
    budget_s: float = math.inf,
    objective: float | str = "mean",
) -> ValueCurve:
    """Of the leading layers of a model whose missing ones stream in while prefill runs.

    ``bandwidth``: bytes per second to each device. ``tokens``: of the prompt that starts it, or a
    sample of prompts whose mean counts. ``budget_s``: until the first token. With the first token
    T(k) of :mod:`pipeline` and the weight w of the objective (0 the mean, 1 the budget):

        value(k) = (1 - w) (T(0) - T(k)) + w (T(0) - T(L)) [T(k) <= budget < T(0)]

    So a start within the budget counts as much as all the seconds by which a cold start is later
    than a warm one, and the two ends share one scale. Of w, 0.001 is always left to the mean.
    """
    weight = min(objective_weight(objective), 1 - _TIE)
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"{profile.name}: a bandwidth of {bandwidth} bytes per second")
    prompts = [tokens] if isinstance(tokens, (int, float)) else list(tokens)
    if not prompts or not all(0 <= prompt < math.inf for prompt in prompts):
        raise ValueError(f"{profile.name}: prompts of {tokens} tokens")
    nbytes = np.array(profile.layer_bytes, dtype=np.int64)
    loads = nbytes / bandwidth
    value = np.zeros(len(nbytes) + 1)
    for prompt in prompts:
        times = first_token_by_prefix(loads, profile.compute(profile.prefill(prompt)))
        value += (1 - weight) * (times[0] - times)
        floor = fewest(times, budget_s, float(loads.sum()))
        if floor is not None and floor > 0:
            value[floor:] += weight * (times[0] - times[-1])
    return ValueCurve(
        profile.name, profile.width, nbytes, value / len(prompts), np.arange(len(nbytes))
    )


def unit_curve(
    name: str,
    nbytes: Sequence[int],
    seconds: Seconds,
    probability: Seconds | None = None,
    *,
    width: int = 1,
    unit: str = "unit",
) -> ValueCurve:
    """Of units that do not wait for each other, such as experts: each saves its ``seconds`` with a
    ``probability`` of its own that a start needs it, so the densest are held first.

    ``nbytes``: of each unit on each device. Raises ValueError for lengths that differ and numbers
    that are no sizes, times or probabilities.
    """
    sizes = np.array(nbytes, dtype=np.int64)
    gain = np.array(seconds, dtype=np.float64)
    chance = np.ones(len(gain)) if probability is None else np.array(probability, np.float64)
    if sizes.ndim != 1 or not sizes.shape == gain.shape == chance.shape:
        raise ValueError(f"{name}: sizes, seconds and probabilities are one each a {unit}")
    if not (np.isfinite(gain) & (gain >= 0) & (chance >= 0) & (chance <= 1)).all():
        raise ValueError(f"{name}: seconds are not negative, probabilities from 0 to 1")
    if (sizes < 1).any():
        raise ValueError(f"{name}: a model has {unit}s, and each has bytes")
    gain *= chance
    order = np.argsort(-gain / sizes, kind="stable")
    value = np.concatenate(([0.0], np.cumsum(gain[order])))
    return ValueCurve(name, width, sizes[order], value, order, unit)
