"""The time to a first token when a model is partly there, and the least that it could be."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Bound:
    """What no loader can beat. ``computes``: seconds of each layer, while an equally paced copy
    runs beside it; ``nbytes``: of each layer; ``bandwidth`` in bytes a second."""

    computes: Sequence[float]
    nbytes: Sequence[int]
    bandwidth: float

    def seconds(self, kept: int) -> float:
        """The first token when the first `kept` layers are resident.

        All layers take their time; and those from layer j on cannot begin before the missing bytes
        up to j have come: max(sum of c, max over missing j of A_j + sum from j of c).
        """
        missing = [0] * kept + list(self.nbytes[kept:])
        arrivals = [nbytes / self.bandwidth for nbytes in accumulate(missing)]
        whole = sum(self.computes)
        before = [0.0, *accumulate(self.computes)]
        last = (arrivals[j] + whole - before[j] for j in range(kept, len(missing)))
        return max([whole, *last])


def ninetieth(values: Sequence[float]) -> float:
    """The 90th percentile."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1]
