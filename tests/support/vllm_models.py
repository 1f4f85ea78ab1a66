"""vLLM engines and small models for them."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"  # tests read vLLM's warnings

from warmserve_rt.demo import vllm_engines  # before vLLM

# isort: split
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams

from warmserve_rt.demo.vllm_engines import WORKER, answers, shut_down, worker_of

__all__ = ["WORKER", "engine", "plain_engine", "shut_down", "tokens", "worker_of", "write_llama"]

# vLLM collects garbage four times in an engine's life, over all objects that its imports made, and
# unfreezes them at the engine's end. Here they stay frozen: 0.6 s of CPU less per collection.
gc.collect()
gc.freeze()
gc.freeze = gc.unfreeze = lambda: None

SETTINGS = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 24,
}
PROMPTS = [[5, 9, 200, 31], [7], [100, 101, 102, 103, 104, 105, 106], [250, 3]]


def write_llama(path: Path, seed: int, *, tied: bool = False, **config: Any) -> Path:
    """Write a Llama of random weights, about 8 MB, that answers differently for each seed."""
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        architectures=["LlamaForCausalLM"],
    )
    LlamaForCausalLM(settings).save_pretrained(path)
    if config:
        settings.update(config)
        settings.save_pretrained(path)
    return path


def plain_engine(model: Path, **options: Any) -> Any:
    """Return an LLM that vLLM loads by itself, on one thread."""
    return vllm_engines.plain_engine(model, **{**SETTINGS, **options})


def engine(model: Path, cache: Path, *, worker: str = WORKER, **options: Any) -> Any:
    """Return an LLM with load format warmserve.

    The options arena, gated and device are passed to the loader, all others to vLLM.
    """
    extra = {name: options.pop(name) for name in ("arena", "gated", "device") if name in options}
    return vllm_engines.arena_engine(
        model, cache, worker=worker, loader=extra, **{**SETTINGS, **options}
    )


def tokens(
    llm: Any, prompts: Sequence[Sequence[int]] = PROMPTS, count: int = 16
) -> list[list[int]]:
    """Return the tokens of greedy answers."""
    how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    return answers(llm, prompts, how)
