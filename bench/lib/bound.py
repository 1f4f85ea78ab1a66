"""A lower bound on the time to first token of a partly resident model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Bound:
    """A bound that no loader can beat.

    ``computes`` are the seconds of each layer, measured beside a copy at the same pace; ``nbytes``
    the bytes of each layer; ``bandwidth`` is in bytes per second.
    """

    computes: Sequence[float]
    nbytes: Sequence[int]
    bandwidth: float

    def seconds(self, kept: int) -> float:
        """Return the bound if the first `kept` layers are resident.

        Each layer i takes its compute time c_i, and layer j cannot begin before its bytes arrive at
        A_j: max(sum of c, max over missing j of A_j + sum from j of c).
        """
        missing = [0] * kept + list(self.nbytes[kept:])
        arrivals = [nbytes / self.bandwidth for nbytes in accumulate(missing)]
        whole = sum(self.computes)
        before = [0.0, *accumulate(self.computes)]
        last = (arrivals[j] + whole - before[j] for j in range(kept, len(missing)))
        return max([whole, *last])


def ninetieth(values: Sequence[float]) -> float:
    """Return the 90th percentile."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1]
