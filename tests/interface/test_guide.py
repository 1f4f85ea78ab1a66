"""Risk: code that the guide tells a server's author to write does not work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_transformers import PROMPT, plain, save  # noqa: E402

from warmserve_rt import Runtime  # noqa: E402
from warmserve_rt.engines.transformers import load  # noqa: E402

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "guide.md").read_text()
BLOCK = r"<!-- (asyncio-[\w-]+)-example -->\n```python\n(.*?)```"
BLOCKS = dict(re.findall(BLOCK, GUIDE, re.DOTALL))


@pytest.fixture
def names(tmp_path: Path) -> Iterator[dict[str, Any]]:
    path = save(tmp_path / "model", "llama")
    with Runtime(arena="16MiB", staging="16MiB") as runtime:
        module = load(runtime, path, name="chat")
        yield {"runtime": runtime, "module": module, "prompt": PROMPT, "path": path}


def test_every_block_of_the_guide_is_run() -> None:
    assert len(BLOCKS) == GUIDE.count("```python") == 5


def test_the_blocks_run_in_order_and_leave_no_lease(
    names: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = plain(names["path"]).generate(PROMPT, max_new_tokens=8, do_sample=False)
    runtime = names["runtime"]
    for block in BLOCKS.values():
        exec(block, names)
        assert runtime.snapshot().leases == 0
    printed = capfd.readouterr().out.splitlines()
    assert printed[0] == str(wanted.tolist())
    assert [int(line) for line in printed[1:9]] == wanted[0, PROMPT.shape[1] :].tolist()
