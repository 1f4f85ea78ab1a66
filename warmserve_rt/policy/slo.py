"""When a first token is due."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Slo:
    """``prefills`` times the prefill of its own prompt, and ``seconds`` more, after a request came.

    Raises ValueError for what is no bound."""

    prefills: float = 5.0
    seconds: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.prefills < math.inf and 0 <= self.seconds < math.inf):
            raise ValueError(
                f"an SLO of {self.prefills:g} prefills and {self.seconds:g} s; "
                "both are finite and not negative"
            )

    def budget(self, prefill: float) -> float:
        """Seconds to the first token of a prompt with that prefill."""
        return self.prefills * prefill + self.seconds
