"""Risk: clients that hang up at random moments crash a server, or leave leases behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

BENCH = Path(__file__).resolve().parents[2] / "bench" / "hangup.py"


def test_clients_that_hang_up_break_nothing(tmp_path: Path) -> None:
    """Run the bench with fewer clients; its server is a separate process."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCH), "--hang-ups", "60", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(report.read_text())["results"]
    assert results["hung_up"] >= 60, done.stderr
    assert (results["crashes"], results["wrong_tokens"], results["leases_left"]) == (0, 0, 0)
    assert results["served"] > 0
