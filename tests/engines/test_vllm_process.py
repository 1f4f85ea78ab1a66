"""An engine whose worker is a process of its own, which may die."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm_models import PROMPTS, engine, plain_engine, tokens, write_llama


def workers() -> list[psutil.Process]:
    """The processes in which weights are used: those that have children are not."""
    children = psutil.Process().children(recursive=True)
    names = [each for each in children if "Worker" in " ".join(each.cmdline() or [each.name()])]
    return names or [each for each in children if not each.children()]


def ask_for_a_minute(llm: Any) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        tokens(llm, PROMPTS[:1], 1)


def test_a_worker_that_was_killed_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama(tmp_path / "model", 1, tied=True)
    plain = plain_engine(model)
    wanted = tokens(plain)
    plain.llm_engine.engine_core.shutdown()

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    llm = engine(model, tmp_path / "cache")
    assert tokens(llm) == wanted
    llm.sleep(1)
    llm.wake_up()
    assert tokens(llm) == wanted
    found = workers()
    assert found
    for each in found:
        os.kill(each.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        ask_for_a_minute(llm)
    llm.llm_engine.engine_core.shutdown()
    again = engine(model, tmp_path / "cache")
    assert tokens(again) == wanted
    again.llm_engine.engine_core.shutdown()
