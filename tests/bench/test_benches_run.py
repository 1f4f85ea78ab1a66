"""Risk: a bench breaks or loses a target, and only the person who wants its figures notices."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

BENCH = Path(__file__).resolve().parents[2] / "bench"
SECTIONS = {"gpu": "gpu.sh"}  # of README.md, if a bench has no section under its own file name
RUNS = [
    ("swap", "host"),
    ("load", "host"),
    ("host_cache", "host"),
    ("processes", "host"),
    ("memory", "host"),
    ("register", "host"),
    ("stream", "host"),
    ("kernels", "host"),
    ("driver_ops", "host"),
    ("driver_ops", "simcuda"),
    ("switch", "simcuda"),
    ("gpu", "simcuda"),
    ("forecast", "host"),
    ("engines_transformers", "host"),
    ("families", "host"),
    ("policies", "host"),
    ("plan", "host"),
]
WITHOUT_TARGETS = [("driver_ops", "host")]
NOT_RUN = {"engines"}  # without vLLM
RUN_ELSEWHERE = {"hangup"}  # with more clients, by tests/engines/test_hang_up.py


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), "--quick", *options],
        cwd="/",  # so that it imports the installed package
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def targets(name: str) -> set[str]:
    """Return the targets that README.md has in the section of a bench."""
    heading = re.escape(SECTIONS.get(name, f"{name}.py"))
    readme = (BENCH / "README.md").read_text()
    section = re.search(rf"^##+ {heading}\b.*?(?=^##+ |\Z)", readme, re.DOTALL | re.MULTILINE)
    assert section, f"bench/README.md has no section {heading}"
    return set(re.findall(r"`(\w+)` (?:<=|>=|=) ", section[0]))


@pytest.mark.parametrize(("name", "device"), RUNS)
def test_a_bench_runs_and_has_its_targets(name: str, device: str) -> None:
    done = run(name, "--device", device)
    assert done.returncode == 0, done.stdout
    wanted = set() if (name, device) in WITHOUT_TARGETS else targets(name)
    assert wanted or (name, device) in WITHOUT_TARGETS
    assert wanted <= set(re.findall(r"\w+", done.stdout)), done.stdout
    assert ": failed: " not in done.stdout, done.stdout  # a part, in a process of its own


@pytest.mark.skipif(bool(importlib.util.find_spec("vllm")), reason="vLLM is installed")
@pytest.mark.parametrize("name", sorted(NOT_RUN))
def test_a_bench_that_cannot_run_says_why(name: str) -> None:
    done = run(name)
    assert done.returncode == 3, done.stdout
    assert done.stdout.startswith("not run: vLLM is missing"), done.stdout


def test_the_gpu_bench_names_the_devices_that_it_accepts() -> None:
    done = run("gpu", "--device", "host")
    assert done.returncode == 2
    assert "--device must be cuda:0, or simcuda" in done.stdout


def test_every_bench_is_run_here() -> None:
    benches = {path.stem for path in BENCH.glob("*.py")}
    assert benches - {name for name, _ in RUNS} == NOT_RUN | RUN_ELSEWHERE
