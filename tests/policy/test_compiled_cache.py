"""Risk: a cache of compiled code that cannot be written or read stops the scheduler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import warmserve_rt

pytest.importorskip("numba")

PACKAGE = Path(warmserve_rt.__file__).parent  # the installed package
PROGRAM = """
import resource, sys
if sys.argv[1:] == ["small"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
import numpy as np
import warmserve_rt.scheduling.scheduler
from warmserve_rt.policy._copies import chance  # the smallest of the compiled functions

print(chance(np.array([0.5, 0.5, 1.0]), 0, 2))
"""
CALLER = """
import numpy as np
from warmserve_rt.policy._caller import twice

print(twice(np.array([0.5, 0.5])))
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a copy of the package in a separate folder, with the files that planning needs."""
    site = tmp_path / "site"
    shutil.copytree(
        PACKAGE, site / "warmserve_rt", ignore=shutil.ignore_patterns("__pycache__", "sim", "demo")
    )
    return site


def compute(site: Path, *arguments: str, program: str = PROGRAM, **environment: str) -> str:
    """Run a compiled function in a new process with only the cache of `site`; return its output."""
    paths = [str(site), *(path for path in sys.path if path.endswith("site-packages"))]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA", "PYTHON", "XDG"))}
    done = subprocess.run(
        [sys.executable, "-s", "-c", program, *arguments],
        env={**clean, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
        | environment,
        cwd=site,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def caches(site: Path) -> list[Path]:
    return [path for path in site.rglob("*.nbi") if path.stat().st_size]


def test_a_scheduler_plans_without_a_writable_folder(
    installed: Path,
) -> None:
    # A file in place of the folder stops root too.
    (installed / "warmserve_rt/policy/__pycache__").write_text("")
    assert compute(installed, HOME="/dev/null", XDG_CACHE_HOME="/dev/null") == "0.25"
    assert caches(installed) == []


def test_a_cache_folder_that_cannot_be_made_is_not_needed(installed: Path) -> None:
    assert compute(installed, NUMBA_CACHE_DIR="/dev/null/cache") == "0.25"


def test_a_full_disk_does_not_stop_the_computation(installed: Path) -> None:
    assert compute(installed, "small") == "0.25"
    assert caches(installed) == []


def test_a_change_of_a_called_function_recompiles_its_caller(installed: Path) -> None:
    copies = installed / "warmserve_rt/policy/_copies.py"
    caller = installed / "warmserve_rt/policy/_caller.py"
    caller.write_text(
        "from ._compiled import jit\n"
        "from ._copies import chance\n\n\n"
        "@jit\n"
        "def twice(available):\n"
        "    return 2 * chance(available, 0, 2)\n"
    )
    assert compute(installed, program=CALLER) == "0.5"
    copies.write_text(copies.read_text().replace("found = 1.0", "found = 3.0"))
    assert compute(installed, program=CALLER) == "1.5"


def test_a_damaged_cache_is_compiled_again(installed: Path) -> None:
    compute(installed)
    made = caches(installed)
    assert made
    for path in made:
        path.write_bytes(path.read_bytes()[:-7])
    for path in installed.rglob("*.nbc"):
        path.write_bytes(b"")
    assert compute(installed) == "0.25"
