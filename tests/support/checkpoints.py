"""Checkpoints in which every granule has bytes unique to its model, layer and revision."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

GRANULE = 2 << 20


@lru_cache(64)
def content(model: str, layer: int, nbytes: int, revision: int = 0) -> bytes:
    """Return a layer's bytes; each granule is unique to (model, layer, granule, revision)."""
    out = bytearray()
    for granule in range(-(-nbytes // GRANULE)):
        seed = [*model.encode(), layer, granule, revision]
        block = np.random.default_rng(seed).integers(0, 256, GRANULE // 64, dtype=np.uint8)
        out += block.tobytes() * 64
    return bytes(out[:nbytes])


def write_safetensors(
    path: Path, tensors: dict[str, tuple[str, list[int], bytes]], metadata: object = None
) -> Path:
    """Write a safetensors file with tensors (dtype, shape, data) by name, in the given order."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, _, data in tensors.values():
            file.write(data)
    return path


def write_model(path: Path, name: str, layers: Sequence[int], revision: int = 0) -> Path:
    """Write a model with one uint8 tensor per layer, of these sizes in bytes, and return its path.

    The tensors are named like a decoder's blocks.
    """
    return write_safetensors(
        path,
        {
            f"model.layers.{i}.weight": ("U8", [nbytes], content(name, i, nbytes, revision))
            for i, nbytes in enumerate(layers)
        },
    )
