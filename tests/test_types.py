"""Risk: a type checker refuses what the documentation says, or accepts what fails at run time."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mypy")

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()

# What the README's lines take as given.
GIVEN = """
from typing import Any
from warmserve_rt import Lease, Runtime
runtime: Runtime
path: str
inputs: Any
torch: Any
model: Any
"""


def problems(tmp_path: Path, source: str) -> list[str]:
    """The errors of mypy --strict, without this package's own."""
    program = tmp_path / "program.py"
    program.write_text(source)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"),
            *("--ignore-missing-imports", "--config-file=", "--no-error-summary"),
            *(f"--cache-dir={tmp_path / 'cache'}", str(program)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert not done.stderr, done.stderr
    return [line.partition("program.py:")[2] for line in done.stdout.splitlines()]


SERVER = """
from warmserve_rt import (
    Lease, LayerSnapshot, Model, ModelSnapshot, Progress, Runtime, Snapshot, Ticket, __version__,
)


async def serve(path: str) -> None:
    async with Runtime("host", arena="2GiB", staging=256 << 20, headroom="10%") as runtime:
        model: Model = runtime.register("chat", path)
        ticket: Ticket = runtime.prewarm("chat")
        await ticket
        ticket.wait(3.0, layer="head")
        done: bool = ticket.done
        parts: tuple[int, int] = ticket.progress
        share: float = ticket.progress.fraction
        lease: Lease
        async with runtime.lease("chat", streaming=True, timeout=3) as lease:
            for name, tensor in lease.tensors.items():
                print(name.upper(), tensor.shape)
        snapshot: Snapshot = runtime.snapshot()
        for name, held in snapshot.models.items():
            layers: tuple[LayerSnapshot, ...] = held.layers
            print(name, layers[0].nbytes)
        models: tuple[Model, ...] = runtime.models
        await runtime.aevict("chat", wait="leases", timeout=30)
        await runtime.aunregister(model)
        print(done, parts, share, models, snapshot.arena_bytes, __version__)
"""


def test_a_server_is_strictly_typed(tmp_path: Path) -> None:
    assert problems(tmp_path, SERVER) == []


def test_wrong_words_are_errors_for_a_checker(tmp_path: Path) -> None:
    source = """
import warmserve_rt
from warmserve_rt import Runtime
runtime = Runtime("host", tensors="numpy")
Runtime("host", tensors="jax")
runtime.evict("chat", wait="lease")
runtime.unregister("chat", wait="lease")
runtime.close(wait="lease")
runtime.stream("high")
runtime.prewarm("chat", priority="high")
warmserve_rt.nothing_of_that_name
"""
    found = problems(tmp_path, textwrap.dedent(source))
    lines = sorted({int(each.split(":")[0]) for each in found if ": error:" in f":{each}"})
    assert lines == [5, 6, 7, 8, 9, 10, 11], found


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_lines_of_the_readme_are_strictly_typed(tmp_path: Path, block: str) -> None:
    """Inside of an async function if they await."""
    if "await " in block or "async " in block:
        block = "async def main() -> None:\n" + textwrap.indent(block, "    ")
    own = "\n".join(
        line
        for line in GIVEN.splitlines()
        if not re.search(rf"^{line.split(':')[0]} = ", block, re.M)
    )
    assert problems(tmp_path, f"{own}\n{block}") == []
