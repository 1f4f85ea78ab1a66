"""Risk: a failing write leaves some of the files, or destroys files of an earlier run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from warmserve_rt.sim.report import atomic_output


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_failing_write_leaves_the_folder_as_it_was(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").write_text("old")
    calls, real = [], os.replace

    def replace_once(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError("no space left")
        real(source, target)

    monkeypatch.setattr(atomic_output.os, "replace", replace_once)
    texts = {"one": "new", "two": "new"}
    if fails_at == 4:
        atomic_output.write_files(texts, tmp_path)
        assert {each.name: each.read_text() for each in tmp_path.iterdir()} == texts
        return
    with pytest.raises(OSError, match="no space"):
        atomic_output.write_files(texts, tmp_path)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"one": "old"}


def test_a_failing_write_removes_the_folder_that_it_created(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        atomic_output.write_files({"x" * 300: ""}, tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
