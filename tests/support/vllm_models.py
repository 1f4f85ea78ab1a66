"""vLLM engines and small models for them."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # must be set before vLLM is imported
os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

from warmserve_rt.engines.vllm import WORKER

# vLLM collects garbage four times in an engine's life, over all objects that its imports made, and
# unfreezes them at the engine's end. Here they stay frozen: 0.6 s of CPU less per collection.
gc.collect()
gc.freeze()
gc.freeze = gc.unfreeze = lambda: None

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
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 24,
        "disable_log_stats": True,
        "enable_prefix_caching": False,
    }
    return LLM(str(model), **{**settings, **options})


def engine(model: Path, cache: Path, *, worker: str = WORKER, **options: Any) -> Any:
    """Return an LLM with load format warmserve.

    The options arena, gated and device are passed to the loader, all others to vLLM.
    """
    extra = {name: options.pop(name) for name in ("arena", "gated", "device") if name in options}
    return plain_engine(
        model,
        load_format="warmserve",
        worker_cls=worker,
        model_loader_extra_config={"cache": str(cache), **extra},
        **options,
    )


def tokens(
    llm: Any, prompts: Sequence[Sequence[int]] = PROMPTS, count: int = 16
) -> list[list[int]]:
    """Return the tokens of greedy answers."""
    how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": [*prompt]} for prompt in prompts]
    return [[*each.outputs[0].token_ids] for each in llm.generate(inputs, how, use_tqdm=False)]


def worker_of(llm: Any) -> Any:
    """Return the worker of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def close(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
