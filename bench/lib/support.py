"""The folder of the tests' helpers, some of which are also used by benches."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[2] / "tests/support"
