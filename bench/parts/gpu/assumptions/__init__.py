"""The simulated driver's assumptions about CUDA, row by row.

Each row is a few cu* calls that confirm or refute an assumption on a device. A row may break its
context, hang or crash, so rows run in separate processes (run.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lib.cuda import CudaError, Gpu, NotRun

DOCUMENTED, OBSERVED, MEASURED, GUESS = "D", "O", "M", "guess"
GRANULE = 2 << 20


class Refuted(Exception):
    """The device behaves differently; the message says how."""


@dataclass(frozen=True)
class Assumption:
    name: str
    assumes: str
    source: str  # documented, observed by others, measured here or guessed
    check: Callable[[Gpu], str | None]  # returns further details
    alone: bool = False  # it needs a fresh process, or breaks its own


ALL: dict[str, Assumption] = {}


def add(row: Assumption) -> None:
    if row.name in ALL:
        raise ValueError(f"row names must be unique, got {row.name!r} twice")
    ALL[row.name] = row


def assumed(
    name: str, assumes: str, source: str, *, alone: bool = False
) -> Callable[[Callable[[Gpu], str | None]], Callable[[Gpu], str | None]]:
    """Register a function as the check of a row; it may raise Refuted or NotRun."""

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
    except Exception as error:  # a bug in the row
        detail, outcome = f"{type(error).__name__}: {error}", "not run"
    return Outcome(row.name, row.assumes, row.source, outcome, detail)
