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

os.environ.update(VLLM_WORKER_MULTIPROCESSING_METHOD="spawn", VLLM_LOGGING_LEVEL="ERROR")

from warmserve_rt.demo import vllm_engines  # before vLLM

# isort: split
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.plugins import load_general_plugins

from warmserve_rt.engines.vllm import arenas
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
    loaders: tuple[Any, ...] = BaseModelLoader, ArenaLoader
    for loader in loaders:
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
        sizes: dict[str, Any] = {
            "max_model_len": 256,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 1 << 27,
        }
        _load_s.clear()
        if cache is None:
            self.llm = vllm_engines.plain_engine(model, **sizes)
        else:
            self.llm = vllm_engines.arena_engine(model, cache, loader=loader, **sizes)
        self.load_s = _load_s[-1] if _load_s else 0.0

    def tokens(self, prompts: int = 4, count: int = 48) -> list[list[int]]:
        """Return the greedy answers to the first `prompts` prompts."""
        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return vllm_engines.answers(self.llm, PROMPTS[:prompts], how)

    @property
    def worker(self) -> Any:
        return vllm_engines.worker_of(self.llm)

    def close(self) -> None:
        vllm_engines.shut_down(self.llm)
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
