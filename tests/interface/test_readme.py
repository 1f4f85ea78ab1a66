"""Risk: the first thing a newcomer tries does not work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_model, write_safetensors

from warmserve_rt import Runtime, testing

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found
    path = write_model(tmp_path / "m", "m", [1000, 5])
    exec(found[1].replace("path/to/checkpoint", str(path)), {})
    assert capsys.readouterr().out == (
        "{'model.layers.0.weight': (1000,), 'model.layers.1.weight': (5,)}\n"
    )


def test_the_simulated_example_runs() -> None:
    found = re.search(r"<!-- simulated-example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found
    names: dict[str, object] = {}
    exec(found[1], names)
    assert not names["cuda"].violations  # type: ignore[attr-defined]


def test_the_example_of_the_scheduler_runs(tmp_path: Path) -> None:
    found = re.search(r"<!-- schedule-example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found
    path = write_model(tmp_path / "m", "m", [1000, 5, 1000])
    with Runtime(arena="16MiB") as runtime:
        runtime.register("chat", path)
        names: dict[str, Any] = {"runtime": runtime}
        exec(found[1], names)
        assert not names["fleet"].errors


def test_the_example_of_other_frameworks_runs(tmp_path: Path) -> None:
    """Run the example in a process that takes the simulated driver for the system's.

    CuPy computes nothing there, because libcudart does not run on the simulated driver.
    """
    pytest.importorskip("cupy")
    pytest.importorskip("numba_cuda")
    found = re.search(r"<!-- frameworks-example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found
    data = np.arange(6, dtype=np.float32)
    path = write_safetensors(tmp_path / "m", {"model.norm.weight": ("F32", [6], data.tobytes())})
    script = f"""
import cupy
import numpy as np
from warmserve_rt import Runtime
runtime = Runtime("cuda:0", arena="8MiB", tensors="dlpack")
runtime.register("chat", {str(path)!r})
{found[1]}
    assert np.array_equal(array.copy_to_host(), np.arange(6, dtype=np.float32))
    mine = weights["model.norm.weight"]
    assert isinstance(mine, cupy.ndarray)
    assert (mine.data.ptr, mine.shape, mine.dtype) == (view.address, (6,), np.float32)
    assert "dltensor_versioned" in repr(capsule)
del weights, view, array, capsule, mine
runtime.close()
"""
    with testing.simulated_cuda(memory="1GiB") as cuda:
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**cuda.environment, "CUPY_CACHE_DIR": str(tmp_path)},
        )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["demo", "test"])
def test_each_command_is_enough_by_itself(name: str) -> None:
    found = re.search(rf"<!-- {name}-command -->\n```sh\n([^\n]*)\n```", README)
    assert found
    assert found[1].startswith("python3 -m venv .venv && .venv/bin/pip install -q -c ")
