"""Risk: the demo with vLLM compares nothing, or claims that a request found missing weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_tenants import cast_for

from warmserve_rt.demo.content import Content
from warmserve_rt.demo.run import GRANULE
from warmserve_rt.demo.vllm_rows import PlainVllm, Restarted, Vllm

PROMPT = [5, 9, 31, 7]
END = 2


def test_rows_answer_as_plain_vllm_and_notice_a_swapped_granule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = cast_for(monkeypatch, tmp_path)
    tenants = {name: paths[name] for name in "AC"}
    contents = {name: Content(path, GRANULE) for name, path in tenants.items()}
    wanted = {}
    for name, path in tenants.items():
        with PlainVllm()(path) as answer:
            wanted[name] = answer(PROMPT, 6)

    restarted = Restarted(tenants, contents)
    with restarted.serving("A") as say:
        assert [*say(PROMPT, 6, END)] == wanted["A"]
    assert restarted.ready("A")
    assert restarted.bytes_moved() == contents["A"].nbytes
    restarted.close()

    granules = sum(map(len, contents["A"].granules))
    row = Vllm(
        tenants,
        (2 * granules + 1) * GRANULE,
        tmp_path / "cache",
        lambda *progress: None,
        prewarm=True,
        mutation=random.Random(0),
    )
    try:
        row.runtime.evict(row.runtime.models[1])
        assert row.ready("A")
        assert not row.ready("C")
        with row.serving("A") as say:
            assert row.bytes_match("A")  # no other model was resident to swap with
            assert [*say(PROMPT, 6, END)] == wanted["A"]
            row.look_ahead(["C"], ["A", "C"])
            row.settle()
        assert row.ready("C")
        with row.serving("C"):
            assert not row.bytes_match("C")
    finally:
        row.close()
