"""Binds a checkpoint's tensors to a transformers module as its parameters and buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from warmserve_rt.checkpoint import DType

from . import names
from .arena_tensors import Home, in_arena

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def bind(module: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make tensors of a checkpoint the parameters and buffers of a module, without reading them.

    Parameters
    ----------
    module : PreTrainedModel
        The module; it is changed in place. It may be bound again to other tensors of the same
        names.
    tensors : mapping of name to tensor
        The tensors under the checkpoint's names.

    Raises
    ------
    ValueError
        As in `load`: parameters and tensors do not match one to one in name, shape and dtype.

    Notes
    -----
    Parameters that the module ties share one tensor if the checkpoint has it under one of their
    names. They stay separate if the checkpoint has both.

    Guarantee: strong (after an exception the module is unchanged).
    """
    bind_targets(module, tensors, names.targets(module, tensors))


def bind_targets(
    module: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    targets: Mapping[str, str],
    home: Home | None = None,
) -> None:
    """Bind tensors whose names in the module are known.

    Parameters
    ----------
    module, tensors
        As in `bind`.
    targets : mapping of name to name
        For each parameter or buffer of the module that the checkpoint has: its name there.
    home : Home, optional
        If given, each weight is bound as a tensor that refuses the operations that `home` refuses.
    """
    owners = _owners(module)
    slots = {name: _slot(owner, leaf) for name, (owner, leaf) in owners.items()}
    dtypes = _dtypes(module, {target: slots[target] for target in targets})
    bound: dict[str, torch.Tensor] = {}
    for target, name in targets.items():
        tensor, slot, dtype = tensors[name], slots[target], dtypes[target]
        if tensor.shape != slot.shape or tensor.dtype != dtype:
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)} in the checkpoint, "
                f"but {type(module).__name__} computes with {dtype} {tuple(slot.shape)}"
            )
        is_parameter = isinstance(slot, nn.Parameter)
        if home is not None:
            bound[target] = in_arena(tensor, home, parameter=is_parameter)
        else:
            bound[target] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    device = next((tensor.device for tensor in tensors.values()), None)
    tied = {id(slots[target]): value for target, value in bound.items()}
    for name, slot in slots.items():
        value = bound.get(name, tied.get(id(slot), slot))
        if value.is_meta:
            raise ValueError(
                f"{type(module).__name__} needs {name!r}, which the checkpoint does not have"
            )
        bound[name] = value
    for name, value in bound.items():
        owner, leaf = owners[name]
        if leaf in owner._parameters:
            owner._parameters[leaf] = value  # type: ignore[assignment]
        else:
            # Buffers that are not in the checkpoint, such as rotary frequencies, were computed on
            # the CPU. The device could not use them there, or would fetch them for each pass.
            owner._buffers[leaf] = value.to(device)


def main_dtype(sizes: Mapping[str, tuple[DType, int]], default: object) -> torch.dtype:
    """Return the dtype with the most bytes, out of the dtypes that a module can compute in.

    Parameters
    ----------
    sizes : mapping of name to (DType, int)
        Each tensor's dtype and bytes. Formats of 8 bits and less are for storage and do not count.
    default : object
        The result if no tensor counts, provided that it is a dtype that a module can compute in;
        otherwise the result is float32.
    """
    totals: dict[torch.dtype, int] = {}
    for dtype, nbytes in sizes.values():
        if (found := _FLOATS.get(dtype.name)) is not None:
            totals[found] = totals.get(found, 0) + nbytes
    if not totals:
        return next((dtype for dtype in _FLOATS.values() if dtype == default), torch.float32)
    return max(totals, key=lambda dtype: totals[dtype])


def needed_casts(
    module: PreTrainedModel, dtypes: Mapping[str, DType], targets: Mapping[str, str]
) -> dict[str, str]:
    """Return the dtype that each floating-point tensor must have, or {} if all have it already.

    Parameters
    ----------
    module : PreTrainedModel
        The module that computes with the tensors.
    dtypes : mapping of name to DType
        The dtypes that the tensors have without these casts.
    targets : mapping of name to name
        As in `bind_targets`.
    """
    owners = _owners(module)
    wanted = _dtypes(module, {target: _slot(*owners[target]) for target in targets})
    floats = {
        name: (_FLOATS[dtypes[name].name], wanted[target])
        for target, name in targets.items()
        if dtypes[name].name in _FLOATS and wanted[target].is_floating_point
    }
    if all(found == dtype for found, dtype in floats.values()):
        return {}
    return {name: str(dtype).removeprefix("torch.") for name, (_, dtype) in floats.items()}


def _owners(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return, by full name, the owner of each parameter and buffer and its name there."""
    return {
        f"{path}.{leaf}".lstrip("."): (part, leaf)
        for path, part in module.named_modules(remove_duplicate=False)
        for leaf, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    }


def _slot(owner: Any, leaf: str) -> torch.Tensor:
    found: torch.Tensor = owner._parameters.get(leaf)
    return owner._buffers[leaf] if found is None else found


def _dtypes(module: PreTrainedModel, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
    """Return the dtypes to which transformers' loader casts a module's parameters and buffers."""
    plan: Mapping[str, torch.dtype] = module._get_dtype_plan(module.dtype)
    parts = [(re.compile(part.replace("*", ".*")), dtype) for part, dtype in plan.items()]
    return {
        name: next((dtype for part, dtype in parts if part.search(name)), slot.dtype)
        for name, slot in slots.items()
    }
