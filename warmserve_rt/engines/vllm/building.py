"""Helpers to build a vLLM model on the meta device: checks, processing, and vLLM's global state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.utils import process_weights_after_loading


def process_again(model: nn.Module, model_config: Any, vllm_config: Any) -> None:
    """Run vLLM's processing on weights that the first start has already processed.

    Tying is disabled, because the first start has decided it and the state's aliases record it.
    """
    settled = copy.copy(model_config)
    settled.word_embeddings_untied_by_checkpoint = False
    process_weights_after_loading(model, settled, torch.device(vllm_config.device_config.device))


def refuse_unsupported(model: nn.Module, *, on_cpu: bool) -> None:
    """Raise ValueError, which names the part, if vLLM's processing of a part turns its weights into
    something other than tensors that can be bound again."""
    for name, part in model.named_modules():
        method = getattr(part, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase):
            continue
        plain = isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)
        if not (plain if on_cpu else method.supports_pre_processed_weights):
            raise ValueError(
                f"load format warmserve cannot serve {type(model).__name__}: "
                f"{type(method).__name__}, of {name!r}, replaces its parameters by a private form. "
                "Use vLLM's own load format for this model"
            )


@contextmanager
def undone_on_error(vllm_config: Any) -> Iterator[None]:
    """Remove what building a model on meta leaves in vLLM's global state.

    Always removes the new rotary modules, which another model must not reuse. After an error also
    removes the new layer names, which the next attempt registers again.
    """
    layers = vllm_config.compilation_config.static_forward_context
    rotary = rotary_embedding._ROPE_DICT
    known, shared = set(layers), set(rotary)
    try:
        yield
    except BaseException:
        for name in layers.keys() - known:
            del layers[name]
        raise
    finally:
        for name in rotary.keys() - shared:
            del rotary[name]
