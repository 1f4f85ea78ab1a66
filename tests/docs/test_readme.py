"""Risk: the first page that a newcomer reads does not work, or leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import write_model
from documents import PAGES, ROOT, blocks
from tiny_transformers import PROMPT, save

from warmserve_rt import Runtime

README = PAGES["README.md"]


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example, _ = blocks("python", page="README.md")
    assert example.marker == "example"
    example.run({}, checkpoint=write_model(tmp_path / "m", "m", [1000, 5]))
    assert capsys.readouterr().out == (
        "{'model.layers.0.weight': (1000,), 'model.layers.1.weight': (5,)}\n"
    )


def test_the_example_of_transformers_runs(tmp_path: Path) -> None:
    _, example = blocks("python", page="README.md")
    assert example.marker == "transformers-example"
    with Runtime(arena="16MiB", staging="16MiB") as runtime:
        names = {"runtime": runtime, "prompt": PROMPT}
        example.run(names, model=save(tmp_path / "model", "llama"))
        assert runtime.snapshot().layers_loaded == 5


@pytest.mark.parametrize("name", ["demo", "test"])
def test_each_command_is_self_contained(name: str) -> None:
    (found,) = [each for each in blocks("sh") if each.marker == f"{name}-command"]
    assert found.page == "README.md"
    assert found.code.count("\n") == 1
    assert found.code.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c ")


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 150


def test_links_lead_to_files_and_headings() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", README)
    assert len(links) > 10
    for link in links:
        path, _, heading = link.partition("#")
        text = (ROOT / path).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert not heading or heading in [h.lower().replace(" ", "-") for h in headings], link
