"""Risk: the simulated driver fits its author's idea of CUDA, but no other program's.

Clients that know nothing of the simulator run in separate processes and find it as
``libcuda.so.1``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from warmserve_rt.testing import simulated_cuda

CLIENTS = Path(__file__).with_name("clients")


@pytest.mark.parametrize("client", ["bindings", "numba_arrays", "cupy_views"])
def test_an_independent_program_runs_on_the_simulator(client: str, tmp_path: Path) -> None:
    with simulated_cuda(memory="1GiB") as cuda:
        done = subprocess.run(
            [sys.executable, CLIENTS / f"{client}.py"],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**cuda.environment, "CUPY_CACHE_DIR": str(tmp_path)},
        )
        assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
        assert not cuda.calls  # the client's process has its own driver
