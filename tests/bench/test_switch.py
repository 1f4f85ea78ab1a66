"""Risk: a change breaks bench/switch.py, which runs seldom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "switch.py"


def test_it_runs_at_its_smallest_size(tmp_path: Path) -> None:
    out = tmp_path / "switch.json"
    command = [sys.executable, BENCH, "--device", "simcuda", "--share", "0", "--json", out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    results = json.loads(out.read_text())["results"]
    assert 0 < results["swap_16MiB_gb_per_s"] < 55  # the link's
    assert results["swap_2MiB_gb_per_s"] < 2 * 1.048576 / 62.7e-3  # GB/s that mapping allows
    assert 1 < results["first_layer_vs_copy"] < 1.3
    assert 0.9 < results["cached_swap_vs_link"] < 1
    assert results["link_padding_share"] == 0
    assert 0 < results["arena_waste_share_mixture"] < 1
