"""Risk: docs/checkpoints.md and the tests disagree on what is refused."""

from __future__ import annotations

import ast
import re
from collections import Counter

from documents import PAGES, ROOT

SOURCE = (ROOT / "tests/checkpoint/test_checkpoint_refusals.py").read_text()
SECTION = PAGES["checkpoints.md"].split("## What is refused")[1]
LINES, REST = SECTION.split("\n### What is accepted")
ACCEPTED = REST.split("\n### ")[0]


def cases(table: str) -> list[str]:
    """Return the keys of a table of test cases in the test's source."""
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table:
            assert isinstance(node.value, ast.Dict)
            return [ast.literal_eval(key) for key in node.value.keys if key]
    raise AssertionError(f"no table {table}")


def test_the_tables_of_refusals_match_the_tests() -> None:
    names = re.findall(r"^def test_(\w+)\(", SOURCE, re.MULTILINE)
    tests = [
        name
        for name in names
        if name not in ("an_invalid_header_is_refused", "an_invalid_index_is_refused")
    ]
    wanted = Counter([*tests, *cases("BAD_HEADERS"), *cases("BAD_INDEXES")])
    assert len(wanted) > 90
    lines = Counter(re.findall(r"^\| .*\S \| `([^`|]+)` \|$", LINES, re.MULTILINE))
    of_all_lines = re.findall(r"\(`([a-z_]+)`\)", LINES)
    accepted = re.findall(r"\(`([a-z_]+)`\)", ACCEPTED)
    assert (len(of_all_lines), len(accepted)) == (1, 2)
    assert lines + Counter(of_all_lines + accepted) == wanted
