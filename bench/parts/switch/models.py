"""The models of the bench: two of each size that take turns, and four whose padding is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lib.harness import LLAMA_2GIB, Llama, write_hollow_checkpoint
from warmserve_rt.checkpoint import open_checkpoint
from warmserve_rt.checkpoint.layout import build_layout
from warmserve_rt.core.devices import Granules

Shapes = Mapping[str, tuple[int, ...]]

SMALL, LARGE = LLAMA_2GIB, Llama(4096, 11008, 4096, 32000, 32)  # 2.2, 13.5 GB
EXPERTS = 64
UNIT = 2 << 20  # bytes that the host cache lends


def shortened(model: Llama, share: float) -> Llama:
    """Return the model with this share of its blocks, at least one."""
    return replace(model, blocks=max(1, round(model.blocks * share)))


def mixture(hidden: int, expert: int, dense: int, vocabulary: int, blocks: int) -> Shapes:
    """Return the shapes of a mixture of experts, which are the units of its residency."""
    whole = Llama(hidden, dense, hidden, vocabulary, blocks).shapes()
    experts = {
        f"model.layers.{block}.mlp.experts.{number}.{name}.weight": shape
        for block in range(1, blocks)  # the first block is dense
        for number in range(EXPERTS)
        for name, shape in {
            "gate_proj": (expert, hidden),
            "up_proj": (expert, hidden),
            "down_proj": (hidden, expert),
        }.items()
    }
    return {**whole, **experts}


# Shapes and how they are cut to layers.
KINDS: Mapping[str, tuple[Shapes, Literal["experts"] | None]] = {
    "135m": (Llama(576, 1536, 192, 49152, 30).shapes(), None),  # SmolLM2
    "1b": (LLAMA_2GIB.shapes(), None),  # TinyLlama
    "8b": (Llama(4096, 14336, 1024, 128256, 32).shapes(), None),  # Llama 3
    "mixture": (mixture(2048, 1408, 2816, 102400, 27), "experts"),  # as DeepSeek-V2-Lite
}


def waste(folder: Path, granules: Granules) -> dict[str, float]:
    """Return, for each kind, the share of its granules' bytes that no tensor occupies."""
    granule, most = granules.nbytes, granules.max_padding
    shares = {}
    for name, (shapes, grouping) in KINDS.items():
        path = folder / f"{name}.safetensors"
        write_hollow_checkpoint(path, shapes)
        with closing(open_checkpoint(path)) as opened:
            layers = build_layout(opened, grouping, granule=granule, max_padding=most).layers
        taken = sum(math.ceil(layer.nbytes / granule) for layer in layers) * granule
        shares[name] = 1 - sum(layer.nbytes for layer in layers) / taken
        path.unlink()
    return shares


def arena_for(path: Path, granule: int) -> int:
    """Return the bytes of an arena for one such model and half of its largest layer."""
    with closing(open_checkpoint(path)) as opened:
        needs = [math.ceil(layer.nbytes / granule) for layer in build_layout(opened).layers]
    return (sum(needs) + max(needs) // 2) * granule


def cache_for(path: Path) -> int:
    """Return the bytes of a host cache for two such models, in units of 2 MiB."""
    with closing(open_checkpoint(path)) as opened:
        layers = build_layout(opened).layers
    return 2 * sum(math.ceil(layer.nbytes / UNIT) for layer in layers) * UNIT
