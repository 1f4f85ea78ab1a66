"""Risk: the documents name a file, a folder or a method that does not exist."""

from __future__ import annotations

import re
from typing import Any

import pytest
from documents import PAGES, ROOT

import warmserve_rt
from warmserve_rt.scheduling.fleet import RuntimeFleet
from warmserve_rt.scheduling.scheduler import Scheduler

OBJECTS: dict[str, Any] = {
    "runtime": warmserve_rt.Runtime,
    "Runtime": warmserve_rt.Runtime,
    "lease": warmserve_rt.Lease,
    "ticket": warmserve_rt.Ticket,
    "fleet": RuntimeFleet,
    "Scheduler": Scheduler,
}
CODE = [
    (page, code)
    for page, text in PAGES.items()
    if page != "changelog.md"  # which has old names
    for code in re.findall(
        r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    )
]
FOLDERS = r"(csrc|warmserve_rt|tests|bench|docs|\.ci)"


def test_files_and_folders_exist() -> None:
    paths = {code for _, code in CODE if re.fullmatch(rf"{FOLDERS}/[\w./-]*", code)}
    whole = "\n".join(text for page, text in PAGES.items() if page != "changelog.md")
    paths |= {"/".join(each) for each in re.findall(rf"\b{FOLDERS}/([\w/]+\.\w+)", whole)}
    short = re.findall(r"(?<!/)\b((?:policy|scheduling)/\w+\.py)", whole)
    paths |= {f"warmserve_rt/{each}" for each in short}
    assert len(paths) > 60
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_methods_exist() -> None:
    found = 0
    for page, code in CODE:
        for name, method in re.findall(r"\b(\w+)(?:\(\w*=?\w*\))?\.(\w+)\(", code):
            if name in OBJECTS:
                found += 1
                assert hasattr(OBJECTS[name], method), f"{page}: {code}"
    assert found > 20


@pytest.mark.parametrize("name", warmserve_rt.__all__)
def test_each_public_name_is_in_the_reference(name: str) -> None:
    snapshots = {"Snapshot", "ModelSnapshot", "LayerSnapshot"}  # by their module
    module = ".. automodule:: warmserve_rt.core.snapshot\n"
    entry = module if name in snapshots else rf":: warmserve_rt\.{name}\n|`{name}`"
    assert re.search(entry, PAGES["api.md"])
