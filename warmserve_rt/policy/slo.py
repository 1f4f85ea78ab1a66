"""The bound on the time to the first token."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Slo:
    """A bound on the time from a request to its first token.

    Parameters
    ----------
    prefills
        Multiples of the prefill time of the request's own prompt.
    seconds
        Seconds added to that.

    Raises
    ------
    ValueError
        If a parameter is negative or not finite.
    """

    prefills: float = 5.0
    seconds: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.prefills < math.inf and 0 <= self.seconds < math.inf):
            raise ValueError(
                f"an SLO must be finite and not negative, got {self.prefills:g} prefills and "
                f"{self.seconds:g} s"
            )

    def budget(self, prefill: float) -> float:
        """Return the seconds until the first token is due, for a prompt with this prefill time."""
        return self.prefills * prefill + self.seconds
