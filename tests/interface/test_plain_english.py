"""Risk: the check of the texts misses unclear English, or rejects plain English."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "plain_english.py"
spec = importlib.util.spec_from_file_location("plain_english", SCRIPT)
assert spec
assert spec.loader
plain_english = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain_english)

# An unclear sentence for each pattern, in their order, and a plain one with the same words.
SENTENCES = [
    ("What is urgent runs first.", "What to wait for. What does a swap cost?"),
    ("Nothing that waits is lost.", "Nothing is lost, and that holds after a fork."),
    ("Of two copies the urgent one runs.", "The urgent one of two copies runs."),
    ("Where the file is short, it is refused.", "Where the file is, and how long"),
    ("Wait where there is no room.", "The file ends where the last slot ends."),
    ("Whoever waits is woken.", "The waiter is woken, however long it waited."),
    ("The copy waits, for it has no room.", "The copy waits, for example for its turn."),
    ("It waits, for the queue is full.", "It waits for a layer, for each model that is known."),
    ("Refuse a threshold that is none.", "The limit is none of these; there is none."),
    ("Return when the layer is there.", "Is there room for the layer?"),
    ("Refuse a cast that there is not.", "Refuse a cast to a format that is not known."),
    ("Wake it when the layer comes.", "The layer comes first in the order."),
    ("The layer goes if the budget is low.", "The layer goes through three states."),
    ("Send so many bytes a second.", "It sends so many bytes that a reader waits."),
    ("The index lacks the tensor.", "It does not fail for lack of room."),
    ("It waits for no more than that.", "There is no more work, and it takes no more copies."),
    ("Refuse a layout such that is invalid.", "The smallest time such that all fit."),
    ("It frees all of it but for one granule.", "It is fast, but for a GPU it is not meant."),
    ("It would be early, were it alone.", "They were alone, and it had room."),
    ("The load is called off.", "The offset is calculated."),
    ("A lock whereby it waits is held.", "A lock that it waits for is held."),
]


@pytest.mark.parametrize("number", range(len(SENTENCES)))
def test_each_pattern_finds_an_unclear_sentence(number: int, tmp_path: Path) -> None:
    unclear, plain = SENTENCES[number]
    path = tmp_path / "text.md"
    path.write_text(f"{plain}\n\nIt ends here.\n{unclear}\n")
    (problem,) = plain_english.problems(path)
    instead = list(plain_english.PATTERNS.values())[number]
    assert problem.startswith(f"{path}:4: {unclear}\n")
    assert problem.endswith(f": {instead}")


def test_every_pattern_has_a_sentence() -> None:
    assert len(SENTENCES) == len(plain_english.PATTERNS)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        (
            "a.py",
            '"""Loads.\n\nWhoever waits is woken.\n"""\nx = 1  # for whoever waits here\n',
            [3, 5],
        ),
        ("a.py", 'raise ValueError(f"the tensor {name} lacks "\n    f"a {shape!r}")\n', [1]),
        (
            "a.py",
            "# Two lines, for\n# it is long.\nwhoever = some(body, lacks)\n",
            [1],
        ),
        ("a.h", "int whoever();  // Blocks\n// whoever calls it.\nchar c = '\"';  // so\n", [1]),
        ("a.cpp", '/* a\nlayer goes */\nf("it lacks "\n  "a name", "{}");\n', [1, 3]),
        ("a.sh", "#!/bin/bash\nwhoever is there  # the layer\n# is there now\n", [2]),
        ("a.md", "# What it is\n\nUse `whoever` here.\n\n```\nit lacks all\n```\n", []),
        ("a.json", '{"text": "whoever waits is woken"}\n', []),
    ],
)
def test_the_check_reads_only_comments_docstrings_and_messages(
    name: str, text: str, lines: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert plain_english.main([str(path)]) == bool(lines)
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(path))]
    assert [int(line.split(":")[1]) for line in found] == lines
