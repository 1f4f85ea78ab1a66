"""Hugging Face transformers models that compute on weights in a runtime's memory.

Nothing is copied. A module is built without memory for its weights, and each parameter becomes a
view at the address where the runtime will put that tensor. So it must be there just as the module
wants it: what transformers would cast is cast as it is loaded, and a checkpoint that it would first
have to fuse or split is refused. Experts that it would stack are computed with one by one instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from . import experts, names
from .blueprints import Blueprint, Blueprints
from .gates import guard
from .skeletons import skeleton
from .token_stream import stream_tokens

if TYPE_CHECKING:
    from warmserve_rt.layers import Grouping
    from warmserve_rt.runtime import Model, Runtime

__all__ = ["bind", "load", "stream_tokens"]

_blueprints = Blueprints()


def load(
    runtime: Runtime,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    dtype: str | None = None,
    layers: Grouping | None = None,
    allow_symlinks: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    **config: Any,
) -> PreTrainedModel:
    """Register a Hugging Face directory and return a module that runs on its weights in place.

    No weight is read: that happens when the model is prewarmed or leased. Run the module under
    `with runtime.lease(module.warmserve_model)`; with `streaming=True` its first blocks compute
    while the last are still loaded. A forward pass raises StaleView while no lease on the model is
    held, whether of the whole module or of a part that is a transformers model itself (its
    `base_model`, an encoder); other ways to read its weights then (printing a parameter, calling a
    block or the head) are faults. The weights are read-only: they take no gradient, and writing to
    one in place is a fault. RWKV would do so in its forward pass: it wants `rescale_every=0`.

    On CUDA a lease may end while the device still computes: each pass is recorded, and an eviction
    waits for it. Replays of a CUDA graph are not: say `lease.record(stream)` after them.

    `name` is the model's in the runtime, by default the directory's; `dtype`, `layers` and
    `allow_symlinks` are as in `Runtime.register`; `auto_class` is the transformers class that
    builds the module; other arguments (`attn_implementation="eager"`) go into its configuration.
    The module computes in `dtype`, or else in the dtype that most of the checkpoint's bytes have,
    whatever its configuration says; what transformers keeps in float32, such as some routers, is
    that here too.

    Where the checkpoint has each expert of a mixture by itself, `layers="experts"` makes each a
    layer of its own, and a pass waits for those alone that the router chose. A model of two stacks
    (T5) has one axis of layers, the encoder's blocks before the decoder's, and wants
    `auto_class=AutoModelForSeq2SeqLM`.

    Raises ValueError, which names the tensor, if parameters and tensors do not match one to one
    in name, shape and dtype; ValueError for a quantized model, which names the method, for one that
    writes to its weights, and for two stacks where `auto_class` wants one; and what
    `Runtime.register` raises. The model is then not registered.
    """
    path = os.fspath(path)
    settings = AutoConfig.from_pretrained(path, local_files_only=True, **config)
    if method := _quantization(settings):
        raise ValueError(
            f"{path} is quantized ({method}): transformers would replace its parameters, and "
            "cannot compute on its file's bytes in place"
        )
    if getattr(settings, "rescale_every", 0):
        raise ValueError(
            f"{path}: {settings.model_type} rescales its weights in place as it computes, and they "
            "are read-only: say rescale_every=0"
        )
    if settings.is_encoder_decoder and auto_class is AutoModelForCausalLM:
        raise ValueError(
            f"{path}: {settings.model_type} has an encoder and a decoder, and AutoModelForCausalLM "
            "builds one stack: say auto_class=transformers.AutoModelForSeq2SeqLM"
        )

    def register(dtype: str | Mapping[str, str] | None) -> Model:
        known_as = name or os.path.basename(os.path.abspath(path))
        links = allow_symlinks
        return runtime.register(known_as, path, dtype=dtype, layers=layers, allow_symlinks=links)

    model = register(dtype)
    try:
        tensors = runtime.tensors(model)
        dtype_of_most = _main_dtype(tensors.values())

        def build() -> Blueprint:
            built = skeleton(settings, dtype_of_most, auto_class=auto_class)
            experts.separate(built, names.stacked(built, tensors))
            return Blueprint(built, names.targets(built, tensors))

        blueprint = _blueprints.find(settings, dtype_of_most, auto_class, tensors, build)
        module = blueprint.module
        if casts := _casts(module, tensors, blueprint.targets):
            runtime.unregister(model)
            model = register(casts)
            tensors = runtime.tensors(model)
        _bind(module, tensors, blueprint.targets)
    except BaseException:
        if model in runtime.models:
            runtime.unregister(model)
        raise
    if module.can_generate() and os.path.exists(os.path.join(path, "generation_config.json")):
        module.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    # Each of these has a call of its own: generate() calls the encoder of two stacks by itself.
    whole: Iterable[nn.Module] = module.modules()
    guard(module, runtime, model, (part for part in whole if isinstance(part, PreTrainedModel)))
    module.warmserve_model = model  # type: ignore[assignment]
    return module


def bind(module: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make `tensors`, under a checkpoint's names, the parameters and buffers of a module.

    No tensor's content is read. Parameters that the module ties share one tensor, under whichever
    of their names the checkpoint has it; they stay apart if the checkpoint has both. May be called
    again with other tensors of the same names.

    Raises ValueError as `load` does; the module is then unchanged.
    """
    _bind(module, tensors, names.targets(module, tensors))


def _bind(
    module: PreTrainedModel, tensors: Mapping[str, torch.Tensor], targets: Mapping[str, str]
) -> None:
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
        is_buffer = not isinstance(slot, nn.Parameter)
        bound[target] = tensor if is_buffer else nn.Parameter(tensor, requires_grad=False)

    device = next((tensor.device for tensor in tensors.values()), None)
    tied = {id(slots[target]): value for target, value in bound.items()}
    for name, slot in slots.items():
        value = bound.get(name, tied.get(id(slot), slot))
        if value.is_meta:
            raise ValueError(f"{type(module).__name__} needs {name!r}: no tensor of the checkpoint")
        bound[name] = value
    for name, value in bound.items():
        owner, leaf = owners[name]
        if leaf in owner._parameters:
            owner._parameters[leaf] = value  # type: ignore[assignment]
        else:
            # Those that no tensor fills were computed on the CPU, such as rotary frequencies. A
            # device cannot compute with them there, or would fetch them for each pass.
            owner._buffers[leaf] = value.to(device)


def _quantization(settings: Any) -> str | None:
    """By what method the weights are quantized, also those of a part of a composite model."""
    parts = (settings, *(getattr(settings, key, None) for key in settings.sub_configs))
    for part in parts:
        found = getattr(part, "quantization_config", None)
        if found is not None:
            values = found if isinstance(found, dict) else vars(found)
            return str(values.get("quant_method", "by an unknown method"))
    return None


def _main_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The floating-point dtype with the most bytes."""
    sizes: dict[torch.dtype, int] = {torch.float32: 0}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _owners(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Of every parameter and buffer, by its name, the part that has it, and its name there."""
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
    """To what dtypes transformers' own loader would cast a module's parameters and buffers."""
    plan: Mapping[str, torch.dtype] = module._get_dtype_plan(module.dtype)
    parts = [(re.compile(part.replace("*", ".*")), dtype) for part, dtype in plan.items()]
    return {
        name: next((dtype for part, dtype in parts if part.search(name)), slot.dtype)
        for name, slot in slots.items()
    }


def _casts(
    module: PreTrainedModel, tensors: Mapping[str, torch.Tensor], targets: Mapping[str, str]
) -> dict[str, str]:
    """By name, in what dtype each floating-point tensor is to be, if one is in another."""
    owners = _owners(module)
    wanted = _dtypes(module, {target: _slot(*owners[target]) for target in targets})
    floats = {
        name: (tensors[name].dtype, wanted[target])
        for target, name in targets.items()
        if tensors[name].is_floating_point() and wanted[target].is_floating_point
    }
    if all(found == dtype for found, dtype in floats.values()):
        return {}
    return {name: str(dtype).removeprefix("torch.") for name, (_, dtype) in floats.items()}
