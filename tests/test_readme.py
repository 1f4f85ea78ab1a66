"""Risk: the first thing a newcomer tries does not work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_model

from warmserve_rt import Runtime

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


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


@pytest.mark.parametrize("name", ["demo", "test"])
def test_each_command_is_enough_by_itself(name: str) -> None:
    found = re.search(rf"<!-- {name}-command -->\n```sh\n([^\n]*)\n```", README)
    assert found
    assert found[1].startswith("python3 -m venv .venv && .venv/bin/pip install -q -c ")
