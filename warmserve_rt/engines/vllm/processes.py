"""Detects that an engine runs in another process than the runtime that it should use.

vLLM starts engines and workers in separate processes, by spawn or fork. A runtime's memory is not
shared with them. The process that has the runtime therefore sets an environment variable (the
mark), which its children inherit.
"""

from __future__ import annotations

import multiprocessing
import os

from warmserve_rt._errors import WarmServeError

MARK = "WARMSERVE_RT_VLLM_USE"
SWITCH = "VLLM_ENABLE_V1_MULTIPROCESSING"
_marked = False  # a forked child inherits it; a newly started program does not


def starts_engines_elsewhere() -> bool:
    """Return whether vLLM's LLM would start this process's engine in another process.

    Returns False in a process that was itself started for an engine.
    """
    return os.environ.get(SWITCH, "1").strip() != "0" and multiprocessing.parent_process() is None


def mark(device: str) -> None:
    """Record that engines on ``device`` should use a runtime of this process."""
    global _marked
    pid, devices = _read()
    devices = devices if pid == os.getpid() else set()
    os.environ[MARK] = ",".join([str(os.getpid()), *sorted(devices | {device})])
    _marked = True


def forget_strangers() -> None:
    """Remove the mark of a parent process that started this one as an independent program."""
    if not _marked and multiprocessing.parent_process() is None:
        os.environ.pop(MARK, None)


def refuse_if_marked(device: str) -> None:
    """Raise WarmServeError if this process is a worker or a fork of a process that has a runtime
    for engines on ``device``."""
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
