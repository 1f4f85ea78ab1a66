"""vLLM engines for engines.py: in this process, on one thread, with timed load_model."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # before vLLM is imported
os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_WORKER_MULTIPROCESSING_METHOD="spawn",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.plugins import load_general_plugins

from warmserve_rt.engines.vllm import WORKER, arenas
from warmserve_rt.engines.vllm.loader import ArenaLoader

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The best way to learn a language is",
    "In the year 1969",
]
_load_s: list[float] = []


def _time_loads() -> None:
    load_general_plugins()
    for loader in (BaseModelLoader, ArenaLoader):
        original = loader.load_model

        def timed(self: Any, *args: Any, _original: Any = original, **options: Any) -> Any:
            begin = perf_counter()
            model = _original(self, *args, **options)
            _load_s.append(perf_counter() - begin)
            return model

        loader.load_model = timed


_time_loads()


class Engine:
    """One LLM. ``load_s``: seconds inside load_model, or 0 if it ran in another process."""

    def __init__(self, model: Path, cache: Path | None = None, **loader: Any) -> None:
        options: dict[str, Any] = {}
        if cache is not None:
            extra = {"cache": str(cache), **loader}
            options = {"load_format": "warmserve", "worker_cls": WORKER}
            options["model_loader_extra_config"] = extra
        _load_s.clear()
        self.llm = LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=8,
            kv_cache_memory_bytes=1 << 27,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **options,
        )
        self.load_s = _load_s[-1] if _load_s else 0.0

    def tokens(self, prompts: int = 4, count: int = 48) -> list[list[int]]:
        """Return the greedy answers to the first `prompts` prompts."""
        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        answers = self.llm.generate(PROMPTS[:prompts], how, use_tqdm=False)
        return [[*each.outputs[0].token_ids] for each in answers]

    @property
    def worker(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


@contextmanager
def engine(model: Path, cache: Path | None = None, **loader: Any) -> Iterator[Engine]:
    made = Engine(model, cache, **loader)
    try:
        yield made
    finally:
        made.close()


def close_arena() -> None:
    """Close the arena, so that the next engine makes a new one."""
    if arena := arenas.find("host"):
        arena.runtime.close()


def write_other(model: Path, into: Path) -> Path:
    """Write a model of the same shapes that answers differently: its last block's output is
    larger."""
    shutil.copytree(model, into, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(model / "model.safetensors")
    blocks = [name for name in tensors if name.endswith("mlp.down_proj.weight")]
    last = max(blocks, key=lambda name: int(name.split(".")[2]))
    tensors[last] = tensors[last] * torch.tensor(1.5)
    save_file(tensors, into / "model.safetensors")
    return into
