"""Risk: a command in the documents has an option, an extra or a script that does not exist.

The commands are parsed, not run: `.ci/run` runs the README's demo and tests, and
`tests/engines/with_vllm/test_vllm_serve.py` its `vllm serve`.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import Any

import pytest
import typer
from documents import ROOT, Block, blocks

from warmserve_rt.cli import app
from warmserve_rt.engines.vllm import WORKER

EXTRAS = re.findall(
    r"^(\w+) = \[",
    (ROOT / "pyproject.toml")
    .read_text()
    .split("[project.optional-dependencies]")[1]
    .split("\n[")[0],
    re.MULTILINE,
)
KERNELS = {"system", "pypi", "none", "auto"}


def words_of(block: Block) -> list[list[str]]:
    """Return the words of each command, without the folder of a virtual environment's program."""
    lines = block.code.strip().splitlines()
    commands = [shlex.split(part) for line in lines for part in line.split(" && ")]
    for words in commands:
        words[0] = re.sub(r"^(\.venv|build/vllm)/bin/", "", words[0])
    return commands


def parse_ours(words: list[str]) -> None:
    """Parse a command of warmserve-rt without running it.

    typer may bring its own click, so that classes of click cannot be asked for.
    """

    def disarm(command: Any) -> Any:
        for each in getattr(command, "commands", {}).values():
            disarm(each).callback = lambda **options: None
        return command

    with pytest.raises(SystemExit) as ended:
        disarm(typer.main.get_command(app)).main(words[1:], prog_name=words[0])
    assert ended.value.code == 0


def check_pip(words: list[str]) -> None:
    assert words[:2] == ["pip", "install"]
    options = [word for word in words[2:] if word.startswith("-")]
    assert set(options) <= {"-q", "-c"}
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    target = re.fullmatch(r"\.(?:\[(.*)\])?", words[-1])
    assert target
    assert set((target[1] or "").split(",")) <= {"", *EXTRAS}


def check(words: list[str]) -> None:
    if words[0].startswith("WARMSERVE_KERNELS="):
        assert words.pop(0).partition("=")[2] in KERNELS
    if words[0] == "warmserve-rt":
        parse_ours(words)
    elif words[0] == "pip":
        check_pip(words)
    elif words[0] == "vllm":
        assert words[1:3] == ["serve", "path/to/model"]
        assert words[3:] == ["--load-format", "warmserve", "--worker-cls", WORKER]
    elif words[0].startswith(".ci/"):
        assert os.access(ROOT / words[0], os.X_OK)
    else:
        assert words in (["python3", "-m", "venv", ".venv"], ["pytest"]), words


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: f"{block.page}:{block.line}")
def test_a_command_is_accepted(block: Block) -> None:
    for words in words_of(block):
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "warmserve-rt simulate --gpu 4",
        "warmserve-rt cache prune --older 3d",
        "warmserve-rt inspect",
        "warmserve-rt serve",
        "pip install '.[simulator]'",
        "pip install -c constraints.txt .",
        "WARMSERVE_KERNELS=conda pip install .",
        "vllm serve path/to/model --load-format warm",
        ".ci/nothing",
        "make",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check(shlex.split(line))


def test_getting_started_has_the_commands_of_the_readme() -> None:
    ours = {block.code for block in blocks("sh", page="getting-started.md")}
    assert {block.code for block in blocks("sh", page="README.md") if block.marker} <= ours
