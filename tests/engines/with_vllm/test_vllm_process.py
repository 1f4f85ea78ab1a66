"""Risk: an engine that starts in a separate process ignores the runtime that it was given."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_models import engine, write_llama

from warmserve_rt import Runtime
from warmserve_rt.engines.vllm import processes, use


def test_an_engine_in_another_process_says_that_it_cannot_use_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = write_llama(tmp_path / "model", 1)
    monkeypatch.setenv(processes.MARK, "")
    monkeypatch.setenv(processes.SWITCH, "1")  # vLLM's default
    with Runtime(arena="64MiB", tensors="torch") as runtime:
        use(runtime)
        with pytest.raises(Exception, match="initialization failed"):
            engine(model, tmp_path / "cache")
        assert runtime.models == ()
    told = capfd.readouterr()  # vLLM's processes log to either stream
    assert "set VLLM_ENABLE_V1_MULTIPROCESSING=0" in told.out + told.err
    assert not [*(tmp_path / "cache").glob("*/weights-*")]  # refused before any work
