"""Risk: a type checker refuses documented code, or accepts code that fails at run time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from documents import blocks

import warmserve_rt

# A checker finds the package here if it is used from its source tree and not installed.
ROOT = Path(warmserve_rt.__file__).resolve().parents[1]
SEARCH = {} if ROOT.name == "site-packages" else {"MYPYPATH": str(ROOT)}

# Names that the documents' lines assume.
GIVEN = """
from typing import Any
from warmserve_rt import Forecaster, Lease, Runtime, RuntimeFleet, Scheduler, testing
from warmserve_rt.policy.profile import ModelProfile
runtime: Runtime
path: str
inputs: Any
prompt: Any
torch: Any
model: Any
llm: Any
profiles: list[ModelProfile]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one cache for all tests: reading torch, once, takes most of the time."""
    return tmp_path_factory.mktemp("typed")


def problems(folder: Path, *sources: str) -> list[str]:
    """Return the errors of mypy --strict in these programs, without this package's own."""
    programs = [folder / f"program{number}.py" for number in range(len(sources))]
    for program, source in zip(programs, sources, strict=True):
        program.write_text(source)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"),
            *("--ignore-missing-imports", "--config-file=", "--no-error-summary"),
            "--untyped-calls-exclude=numba",
            *(f"--cache-dir={folder / 'cache'}", *map(str, programs)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env={**os.environ, **SEARCH},
    )
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


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


def test_a_server_is_strictly_typed(folder: Path) -> None:
    assert problems(folder, SERVER) == []


def test_a_type_checker_refuses_wrong_words(folder: Path) -> None:
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
    found = problems(folder, textwrap.dedent(source))
    lines = sorted({int(each.split(":")[1]) for each in found if ": error:" in each})
    assert lines == [5, 6, 7, 8, 9, 10, 11], found


def test_the_examples_of_the_docs_are_strictly_typed(folder: Path) -> None:
    """The blocks on asyncio are left out: their functions have no types, to be short."""
    programs = []
    for block in blocks("python"):
        if block.marker.startswith("asyncio-"):
            continue
        given = "\n".join(
            line
            for line in GIVEN.splitlines()
            if not re.search(rf"^{line.split(':')[0]} = ", block.code, re.M)
        )
        programs.append(f"{given}\n{block.code}")
    assert len(programs) > 20
    assert problems(folder, *programs) == []
