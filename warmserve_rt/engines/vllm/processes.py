"""Tells an engine that a runtime was handed to vLLM in another process, which it cannot reach.

vLLM starts engines and workers in processes of their own, by spawn or fork. Memory of a runtime is
not shared with them. So the process that has the runtime leaves a mark in its environment, which
its children inherit.
"""

from __future__ import annotations

import multiprocessing
import os

from warmserve_rt._errors import WarmServeError

MARK = "WARMSERVE_RT_VLLM_USE"
SWITCH = "VLLM_ENABLE_V1_MULTIPROCESSING"
_marked = False  # survives a fork, but not the start of another program


def starts_engines_elsewhere() -> bool:
    """Whether vLLM's LLM would start an engine of this process in another one. False in a process
    that was itself started for one."""
    return os.environ.get(SWITCH, "1").strip() != "0" and multiprocessing.parent_process() is None


def mark(device: str) -> None:
    """Notes that engines on ``device`` are meant to use a runtime of this process."""
    global _marked
    pid, devices = _read()
    devices = devices if pid == os.getpid() else set()
    os.environ[MARK] = ",".join([str(os.getpid()), *sorted(devices | {device})])
    _marked = True


def forget_strangers() -> None:
    """Drops the mark of a process that started this one as a program of its own."""
    if not _marked and multiprocessing.parent_process() is None:
        os.environ.pop(MARK, None)


def refuse_if_marked(device: str) -> None:
    """Raises WarmServeError if an ancestor, of which this process is a worker or a fork, has a
    runtime for engines on ``device``."""
    pid, devices = _read()
    inherited = _marked or multiprocessing.parent_process() is not None
    if inherited and pid != os.getpid() and device in devices:
        raise WarmServeError(
            f"warmserve_rt.engines.vllm.use() gave a runtime on {device!r} to process {pid}, but "
            f"this engine runs in another process ({os.getpid()}), which cannot use its memory: "
            f"set {SWITCH}=0 before the engine starts (this works for vllm.LLM without tensor "
            "parallelism; AsyncLLM and `vllm serve` always start other processes), or leave out "
            'use() and size the engine\'s own arena with "arena" of model_loader_extra_config'
        )


def _read() -> tuple[int, set[str]]:
    pid, *devices = os.environ.get(MARK, "").split(",")
    return (int(pid) if pid.isdecimal() else 0), set(devices)
