"""vLLM engines in this process, on one thread: for the demo, the benches and the tests.

Import this module before vLLM, because it sets variables that vLLM reads when it is imported. A
variable that the environment has stays: ``VLLM_ENABLE_V1_MULTIPROCESSING`` (here 0, so that
engines run in this process) and ``VLLM_LOGGING_LEVEL`` (here ERROR).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
)

from vllm import LLM, SamplingParams

from warmserve_rt.engines.vllm import WORKER


def plain_engine(model: Path, **options: Any) -> Any:
    """Return an LLM that vLLM loads by itself.

    Parameters
    ----------
    model : Path
        The model's folder.
    **options
        Options of vLLM's ``LLM``. By default it computes in float32, without graphs, a prefix cache
        or statistics.
    """
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    return LLM(str(model), **{**settings, **options})


def arena_engine(
    model: Path,
    cache: Path,
    *,
    worker: str = WORKER,
    loader: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return an LLM with load format warmserve.

    Parameters
    ----------
    model : Path
        The model's folder.
    cache : Path
        The folder of the cache of processed weights.
    worker : str
        The worker's class.
    loader : mapping, optional
        More options of the loader: arena, gated, device.
    **options
        As for :func:`plain_engine`.
    """
    return plain_engine(
        model,
        load_format="warmserve",
        worker_cls=worker,
        model_loader_extra_config={"cache": str(cache), **(loader or {})},
        **options,
    )


def answers(llm: Any, prompts: Sequence[Any], sampling: SamplingParams) -> list[list[int]]:
    """Return the tokens of the answers to texts or token ids."""
    inputs = [
        prompt if isinstance(prompt, str) else {"prompt_token_ids": [*prompt]} for prompt in prompts
    ]
    found = llm.generate(inputs, sampling, use_tqdm=False)
    return [[*each.outputs[0].token_ids] for each in found]


def worker_of(llm: Any) -> Any:
    """Return the worker of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def shut_down(llm: Any) -> None:
    """End an engine. Its memory is free once the caller has dropped it and called
    :func:`gc.collect`."""
    llm.llm_engine.engine_core.shutdown()
