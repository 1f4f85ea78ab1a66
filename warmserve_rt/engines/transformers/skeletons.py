"""Builds transformers modules without memory for their weights."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

_FILLS = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, nn.init.constant_} | {
    getattr(torch.Tensor, name) for name in ("uniform_", "normal_", "fill_", "zero_")
}


def skeleton(
    config: Any, dtype: torch.dtype, *, auto_class: Any = AutoModelForCausalLM, **options: Any
) -> PreTrainedModel:
    """Return a module in eval mode with its parameters on the meta device and its buffers filled.

    A buffer that transformers cannot fill stays on the meta device.

    Parameters
    ----------
    config : PreTrainedConfig
        The configuration.
    dtype : torch.dtype
        The dtype that the module computes in.
    auto_class : class of transformers
        The class that builds the module.
    **options
        Further arguments of ``auto_class.from_config``.

    Raises
    ------
    ValueError
        The module has a tensor on the meta device that is neither a parameter nor a buffer; the
        message names it.
    """
    with torch.device("meta"), _FillsNothing():
        module: PreTrainedModel = auto_class.from_config(config, dtype=dtype, **options)
    # The constructor fills buffers, but here it ran on meta. transformers' own loader refills
    # buffers by initialising the module again with its parameters marked as initialised; we do the
    # same, twice, with buffers full of 0 and then of 1. A buffer whose two results differ still has
    # old content, so the initialisation does not fill it.
    for parameter in module.parameters():
        _mark_initialized(parameter)
    parts = {
        module.get_submodule(path)
        for name, _ in module.named_buffers(remove_duplicate=False)
        for path in _parents(name)
    }
    once, again = (_initialized(module, parts, start) for start in (0, 1))
    for name, buffer in again.items():
        if not torch.equal(once[name], buffer):
            owner, leaf = _owner(module, name)
            owner._buffers[leaf] = buffer.to("meta")
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                where = f"{path}.{name}".lstrip(".")
                raise ValueError(
                    f"{type(module).__name__} has {where!r}, a tensor that is not a buffer"
                )
    untyped: Any = module
    untyped.eval()
    return module


def _parents(name: str) -> list[str]:
    """Return the paths of the modules that contain a tensor, from its owner to the root, ""."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return module.get_submodule(parent), leaf


class _FillsNothing(TorchFunctionMode):
    """Skips functions that fill tensors if the tensor is on meta; saves a third of the build time.

    Affects only this thread. transformers' `no_init_weights` patches torch's functions for all.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _mark_initialized(thing: Any, done: bool = True) -> None:
    thing._is_hf_initialized = done


def _initialized(
    module: PreTrainedModel, parts: Container[nn.Module], start: int
) -> dict[str, torch.Tensor]:
    """Fill all buffers with `start` on the CPU, initialise the parts as transformers does, and
    return copies of the buffers."""
    for name, buffer in module.named_buffers(remove_duplicate=False):
        owner, leaf = _owner(module, name)
        owner._buffers[leaf] = torch.full_like(buffer, start, device="cpu")
    for part in module.modules():
        _mark_initialized(part, part not in parts)
    untyped: Any = module
    untyped.initialize_weights()
    return {name: buffer.clone() for name, buffer in module.named_buffers(remove_duplicate=False)}
