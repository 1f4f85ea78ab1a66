"""Tiny random models of the families of transformers, and the results of transformers for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

PROMPT = torch.tensor([[7, 3, 55, 20, 9, 41, 6, 30, 12]])
COMMON = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Experts of 40 columns: vector loops leave a tail on any processor, and other code computes the
# tail, with other rounding.
_ROUTED = {**LLAMA, "moe_intermediate_size": 40, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {  # mixtures of experts besides Mixtral
    "qwen2_moe": (
        "qwen2_moe",
        {**_ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_moe": ("qwen3_moe", {**_ROUTED, "head_dim": 16, "num_experts": 4}),
    "olmoe": ("olmoe", {**_ROUTED, "num_experts": 4}),
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "llama-yarn": (
        "llama",
        {
            **LLAMA,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 16}),
    "gemma2": ("gemma2", {**LLAMA, "head_dim": 16}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
    "opt": ("opt", {**LLAMA, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "apertus": ("apertus", LLAMA),  # has buffers in its checkpoint
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "rwkv": ("rwkv", {"hidden_size": 64, "num_hidden_layers": 2, "rescale_every": 0}),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **LLAMA,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "gpt_oss": ("gpt_oss", {**LLAMA, "head_dim": 16, "num_local_experts": 4}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4}),
    **MIXTURES,
}


def save(path: Path, family: str, seed: int = 0, dtype: Any = torch.float32, **kwargs: Any) -> Path:
    """Write the checkpoint of a tiny random model and return its path."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **COMMON, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():  # by default all biases, and all norms, are equal
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path, **{"save_original_format": False, **kwargs})
    return path


def assert_rounded_alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Check that two results differ by rounding alone.

    The same products in other shapes or strides run in other vector loops, which order sums and
    approximate functions differently; which loops do depends on the processor. So each rounding may
    differ by a unit in the last place, relative to the largest value that it adds to. 32 of them
    are allowed: a few for each block of a tiny model. A wrong weight differs by far more.
    """

    allowed = 32 * torch.finfo(wanted.dtype).eps * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=allowed)


def plain(path: Path, auto_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Return a model that transformers loads by itself.

    Its weights are cloned off the mapped file. Kernels give equal bits for equal operations only
    on memory that is aligned to 64 bytes, as clones and the arena's tensors are.
    """
    model = auto_class.from_pretrained(path, **options).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def plain_logits(path: Path, **options: Any) -> Any:
    return plain(path, **options)(PROMPT).logits
