"""Models for the transformers benches: made at random, so that nothing is downloaded, or a second
one of the shapes of a first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
        "vocab_size": 8192,
    },
    "1b": {  # Llama 3.2 1B's
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
}


def make(path: Path, size: str, device: torch.device, seed: int) -> Path:
    """A random Llama, in bf16 or, on the host, float32; initialised where it is to run."""
    sizes = SIZES[size]
    deviation = sizes["hidden_size"] ** -0.5  # blocks outweigh the embedding: tokens tell seeds
    config = LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=deviation)
    torch.manual_seed(seed)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        auto: Any = AutoModelForCausalLM
        module = auto.from_config(config, dtype=dtype)
    module.save_pretrained(path)
    _settle(path)
    return path


def make_other(model: Path, path: Path) -> Path:
    """A model of the same configuration that answers differently: it has the same weights, but
    the rows of each block's last matrix in reverse."""
    shutil.copytree(model, path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("mlp.down_proj.weight"):
                tensors[name] = tensor.flip(0).contiguous()
        file.unlink()  # it is what load_file has mapped
        save_file(tensors, file, metadata={"format": "pt"})
    _settle(path)
    return path


def _settle(path: Path) -> None:
    """Or writing it back would go on while something is timed."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
