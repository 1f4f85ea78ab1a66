"""What the simulated driver assumes of CUDA, row by row: each is a few cu* calls on a device, and
is confirmed there or refuted.

A row may break its context, hang or die: rows run in processes of their own (run.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lib.cuda import CudaError, Gpu, NotRun

DOCUMENTED, OBSERVED, MEASURED, GUESS = "D", "O", "M", "guess"
GRANULE = 2 << 20


class Refuted(Exception):
    """The device does something else; the text says what."""


@dataclass(frozen=True)
class Assumption:
    name: str
    assumes: str
    source: str  # how it was known: documented, observed by others, measured here, guessed
    check: Callable[[Gpu], str | None]  # returns what else is worth knowing
    alone: bool = False  # it needs a process that nothing else was done in, or breaks its own


ALL: dict[str, Assumption] = {}


def add(row: Assumption) -> None:
    if row.name in ALL:
        raise ValueError(f"two rows {row.name!r}")
    ALL[row.name] = row


def assumed(
    name: str, assumes: str, source: str, *, alone: bool = False
) -> Callable[[Callable[[Gpu], str | None]], Callable[[Gpu], str | None]]:
    """A row; the function raises Refuted, or NotRun."""

    def register(check: Callable[[Gpu], str | None]) -> Callable[[Gpu], str | None]:
        add(Assumption(name, assumes, source, check, alone))
        return check

    return register


def expect(got: object, wanted: object, what: str = "") -> None:
    if got != wanted:
        raise Refuted(f"{what} {got}".strip())


@dataclass(frozen=True)
class Outcome:
    name: str
    assumes: str
    source: str
    outcome: str  # confirmed, refuted, not run
    detail: str = ""

    def __str__(self) -> str:
        joined = {"refuted": ": got ", "not run": ": ", "confirmed": "; "}[self.outcome]
        return self.outcome + (joined + self.detail if self.detail else "")


def outcome_of(row: Assumption, cuda: Gpu) -> Outcome:
    try:
        detail, outcome = row.check(cuda) or "", "confirmed"
    except Refuted as error:
        detail, outcome = str(error), "refuted"
    except CudaError as error:
        detail, outcome = f"{error.function} returned {error.code}", "refuted"
    except NotRun as error:
        detail, outcome = str(error), "not run"
    except Exception as error:  # a mistake of the row's own
        detail, outcome = f"{type(error).__name__}: {error}", "not run"
    return Outcome(row.name, row.assumes, row.source, outcome, detail)
