"""transformers modules without memory for their weights."""

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
    """A module in eval mode with its parameters on the meta device and its buffers filled.

    A buffer that transformers does not know how to fill is on the meta device too. Raises
    ValueError, which names it, for a tensor there that is neither parameter nor buffer.
    """
    with torch.device("meta"), _FillsNothing():
        module: PreTrainedModel = auto_class.from_config(config, dtype=dtype, **options)
    # What a buffer holds is the constructor's business, which ran on meta. transformers' own
    # loader refills buffers by initialising the module again with its parameters marked as done.
    # A buffer that keeps what it held before is one that the initialisation forgot.
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
                raise ValueError(f"{type(module).__name__} has {where!r}, a tensor but no buffer")
    untyped: Any = module
    untyped.eval()
    return module


def _parents(name: str) -> list[str]:
    """The paths of the modules that a tensor is in, from its owner to the outermost, ""."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return module.get_submodule(parent), leaf


class _FillsNothing(TorchFunctionMode):
    """Leaves out what would fill tensors without memory, a third of the time a module takes.

    Of this thread alone, unlike transformers' `no_init_weights`, which patches torch's functions.
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
    """The buffers after transformers' initialisation of these parts, each on the CPU and first full
    of `start`."""
    for name, buffer in module.named_buffers(remove_duplicate=False):
        owner, leaf = _owner(module, name)
        owner._buffers[leaf] = torch.full_like(buffer, start, device="cpu")
    for part in module.modules():
        _mark_initialized(part, part not in parts)
    untyped: Any = module
    untyped.initialize_weights()
    return {name: buffer.clone() for name, buffer in module.named_buffers(remove_duplicate=False)}
