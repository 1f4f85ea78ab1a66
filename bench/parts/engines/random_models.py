"""Models for the transformers benches: random models, which need no download, and variants of a
model with the same shapes."""

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
    """Save a random Llama, made on the device that will run it: bf16 on CUDA, else float32."""
    sizes = SIZES[size]
    deviation = sizes["hidden_size"] ** -0.5  # blocks outweigh the embedding, so seeds differ
    config = LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=deviation)
    torch.manual_seed(seed)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        auto: Any = AutoModelForCausalLM
        module = auto.from_config(config, dtype=dtype)
    module.save_pretrained(path)
    _settle(path)
    return path


def make_tiny(path: Path) -> Path:
    """Save a random Llama of 20 MB for the host."""
    return make(path, "tiny", torch.device("cpu"), 1)


def make_other(model: Path, path: Path) -> Path:
    """Save a model of the same configuration that answers differently.

    It has the same weights, but with reversed rows in the last matrix of each block.
    """
    shutil.copytree(model, path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("mlp.down_proj.weight"):
                tensors[name] = tensor.flip(0).contiguous()
        file.unlink()  # load_file has mapped the old file, which must not change
        save_file(tensors, file, metadata={"format": "pt"})
    _settle(path)
    return path


def _settle(path: Path) -> None:
    """Sync the files, because write-back would otherwise continue during measurements."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
