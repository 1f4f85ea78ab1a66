"""Risk: processes that share an arena take their steps in an order in which a lease is broken.

`lease_protocol.cpp` searches all orders, with crashes of every process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORRECT = {"two-clients", "two-threads", "restarts", "everything"}
VARIANT = re.compile(r"(holds|broken) ([a-z-]+): .* \(\d+ states\)")

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is missing")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Compile and run the checker; return the lines that it prints for each variant."""
    program = tmp_path_factory.mktemp("processes") / "lease_protocol"
    source = HERE / f"{program.name}.cpp"
    subprocess.run(["g++", "-O2", "-std=c++20", source, "-o", program], check=True, timeout=300)
    thorough = ["--thorough"] if os.environ.get("CI_ALL") else []
    done = subprocess.run([program, *thorough], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    lines: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if found := VARIANT.fullmatch(line):
            lines[found[2]] = []
        lines[list(lines)[-1]].append(line)
    return lines


def test_the_protocol_holds_in_every_order_of_steps(judged: dict[str, list[str]]) -> None:
    correct = {name: lines for name, lines in judged.items() if name in CORRECT}
    assert len(correct) >= 3
    for lines in correct.values():
        assert [line.split()[0] for line in lines] == ["holds"]


def test_every_fault_is_found_with_a_trace(judged: dict[str, list[str]]) -> None:
    faults = re.search(r"enum class Fault \{(.*?)\}", (HERE / "lease_setup.h").read_text(), re.S)
    assert faults
    names = {name.replace("_", "-") for name in re.findall(r"\w+", faults[1])} - {"none"}
    assert set(judged) - CORRECT == names
    for name in names:
        verdict, *trace, consequence = judged[name]
        assert verdict.startswith("broken ")
        assert len(trace) >= 4
        assert all(re.match(r"    (broker|client \d.*): ", step) for step in trace)
        assert consequence.startswith("  so ")
