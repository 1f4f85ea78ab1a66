"""The cache key of an engine's processed weights: everything that they depend on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)

from .cache import Key

_WEIGHTS = (".safetensors", ".bin", ".pt", ".json")


def key_of(vllm_config: Any, model_config: Any) -> Key:
    """Return the key of this rank's shard. Call it in the worker, which knows its rank."""
    source = model_config.model_weights or model_config.model
    folder = Path(source)
    parallel, stages = vllm_config.parallel_config, get_pp_group()
    place: dict[str, Any] = {
        "model": os.path.realpath(folder) if folder.exists() else source,
        "revision": model_config.revision,
        "dtype": str(model_config.dtype),
        "quantization": model_config.quantization,
        "device": _device(vllm_config),
        "tensor parallelism": [
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
        ],
        "pipeline parallelism": [stages.rank_in_group, stages.world_size],
        "expert parallelism": [
            parallel.enable_expert_parallel,
            parallel.data_parallel_index if parallel.enable_expert_parallel else 0,
            parallel.data_parallel_size if parallel.enable_expert_parallel else 1,
        ],
    }
    settings = model_config.hf_config.to_json_string(use_diff=False)
    content = {
        "checkpoint": _files(folder),
        "configuration": hashlib.sha256(settings.encode()).hexdigest(),
        "vLLM": vllm.__version__,
        "torch": torch.__version__,
    }
    return Key(os.path.basename(os.path.abspath(source)), place, content)


def _device(vllm_config: Any) -> str:
    kind = str(vllm_config.device_config.device_type)
    return kind if kind == "cpu" else f"{kind} {torch.cuda.get_device_name()}"


def _files(folder: Path) -> list[list[Any]]:
    """Return name, size and modification time of each file that the weights may depend on.

    Returns [] for a model that vLLM downloads itself; only its revision identifies its content.
    """
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(found)]
