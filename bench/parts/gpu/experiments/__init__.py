"""Experiments that decide a question of design which only a GPU can answer.

Each is a function. The first paragraph of its docstring says what it decides; the paragraph that
begins with "Expected:" says what should be found, and why. It records figures (`Part.row`) and, for
each sentence that follows from them, `Part.decide`. gpu.py runs each in a process of its own.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from parts.gpu.part import Part

_EXPECTED = "Expected: "


@dataclass(frozen=True)
class Experiment:
    number: str
    question: str
    expected: str
    work: Callable[[Part], None]
    checkpoints: tuple[str, ...] = ()  # that must exist

    def __call__(self, part: Part) -> None:
        part.prefix = f"{self.number.lower()}_"
        self.work(part)

    def heading(self) -> str:
        """Return the first lines of the experiment's block."""
        question = wrapped(f"{self.number}: {self.question}", "")
        return f"\n{question}\n{wrapped(f'expected: {self.expected}')}"


def wrapped(text: str, indent: str = "  ") -> str:
    """Return a paragraph of an experiment's block."""
    return textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=" " * 4)


ALL: dict[str, Experiment] = {}


def experiment(
    number: str, *checkpoints: str
) -> Callable[[Callable[[Part], None]], Callable[[Part], None]]:
    """Register a function as the experiment of this number."""

    def register(work: Callable[[Part], None]) -> Callable[[Part], None]:
        paragraphs = [" ".join(p.split()) for p in (inspect.getdoc(work) or "").split("\n\n")]
        expected = next(p for p in paragraphs if p.startswith(_EXPECTED))
        expected = expected.removeprefix(_EXPECTED)
        ALL[number] = Experiment(number, paragraphs[0], expected, work, checkpoints)
        return work

    return register


def load_all() -> dict[str, Experiment]:
    """Import the modules that have experiments; return these in the order of their numbers."""
    from . import (  # noqa: F401
        aliasing,
        capture,
        interference,
        mapping,
        page_cache,
        pinned,
        processes,
        swaps,
    )

    return {number: ALL[number] for number in sorted(ALL, key=lambda number: int(number[1:]))}
