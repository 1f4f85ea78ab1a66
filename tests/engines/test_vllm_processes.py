"""Risk: a runtime is silently given to vLLM in one process while its engines run in another."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from warmserve_rt import Runtime
from warmserve_rt.engines import vllm as engine
from warmserve_rt.engines.vllm import arenas, processes


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    monkeypatch.setenv(processes.MARK, "")
    monkeypatch.setattr(processes, "_marked", False)
    monkeypatch.setenv(processes.SWITCH, "0")
    with Runtime(arena="8MiB", tensors="torch") as runtime:
        engine.use(runtime)
        yield runtime


def start_an_engine(device: str = "host") -> str:
    """Do what an engine does first in its process; return "started" or the error."""
    processes.forget_strangers()
    try:
        arena = arenas.obtain(device, "4MiB")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert arena is not None
    arena.runtime.close()
    return "started"


def start_a_worker() -> str:
    """Start a worker from this process, as an engine's process does; return its answer."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(start_an_engine)


def give_it_one_of_its_own() -> str:
    with Runtime(arena="8MiB", tensors="torch") as runtime:
        engine.use(runtime)
        arena = arenas.obtain("host", None)
        return "its own" if arena and arena.runtime is runtime else "another"


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_an_engine_in_a_child_refuses_to_start_without_its_parent_s_runtime(
    handed_over: Runtime, method: str
) -> None:
    with multiprocessing.get_context(method).Pool(1) as pool:
        said = pool.apply(start_an_engine)
        assert said.startswith("WarmServeError: ")
        assert f"to process {os.getpid()}" in said
        assert "set VLLM_ENABLE_V1_MULTIPROCESSING=0" in said
        assert pool.apply(give_it_one_of_its_own) == "its own"


def test_a_worker_of_an_engine_in_a_child_refuses_to_start(handed_over: Runtime) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_answer, args=(theirs,))
    child.start()
    assert ours.recv().startswith("WarmServeError: ")
    child.join()


def _answer(pipe: object) -> None:
    pipe.send(start_a_worker())  # type: ignore[attr-defined]


def test_an_engine_in_a_forked_child_refuses_to_start(handed_over: Runtime) -> None:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, start_an_engine().encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read) as said:
        assert "cannot use its memory" in said.read()


def test_a_started_program_can_have_its_own_engines(handed_over: Runtime) -> None:
    """A server started by a process with a runtime is not one of that process's engines."""
    script = "import test_vllm_processes as t; print(t.start_an_engine(), t.start_a_worker())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    assert done.stdout.split() == ["started", "started"]


def test_engines_of_other_devices_and_of_this_process_are_allowed(
    handed_over: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = arenas.obtain("host", None)
    assert arena is not None
    assert arena.runtime is handed_over
    monkeypatch.setenv(processes.MARK, f"{os.getpid() + 1},cuda:0")
    processes.refuse_if_marked("host")


@pytest.mark.parametrize(("switch", "warned"), [(None, True), ("1", True), ("0", False)])
def test_a_runtime_for_engines_that_start_elsewhere_is_warned_of_at_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    switch: str | None,
    warned: bool,
) -> None:
    monkeypatch.setenv(processes.MARK, "")
    if switch is None:
        monkeypatch.delenv(processes.SWITCH, raising=False)
    else:
        monkeypatch.setenv(processes.SWITCH, switch)
    with Runtime(arena="8MiB") as runtime, caplog.at_level(logging.WARNING):
        engine.use(runtime)
    assert ("set VLLM_ENABLE_V1_MULTIPROCESSING=0" in caplog.text) == warned


def test_importing_the_plugin_imports_no_torch() -> None:
    script = "import sys, warmserve_rt.engines.vllm.command; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout == "False\n"
