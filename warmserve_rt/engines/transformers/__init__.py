"""Hugging Face transformers models that compute on weights in a runtime's memory.

The module copies no weights. It is built without memory for its weights, and each parameter
becomes a view at the address where the runtime will put that tensor. Each tensor in the arena must
therefore have the form that the module computes with. Weights that transformers would cast are cast
while they are loaded. A checkpoint whose tensors transformers would fuse or split is refused.
Experts that transformers would stack are run one by one instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from warmserve_rt.checkpoint import open_checkpoint
from warmserve_rt.checkpoint.dtypes import planned_casts
from warmserve_rt.engines.torch.gates import guard

from . import moe, names
from .arena_modules import protect
from .arena_tensors import Home
from .binding import bind, bind_targets, main_dtype, needed_casts
from .blueprints import Blueprint, Blueprints
from .options import configuration, dtype_name, quantization
from .skeletons import skeleton
from .token_stream import stream_tokens

if TYPE_CHECKING:
    from warmserve_rt.checkpoint.layout import Grouping
    from warmserve_rt.core.model import Model
    from warmserve_rt.core.runtime import Runtime

    class BoundModel(PreTrainedModel):  # type: ignore[no-untyped-call]
        """A module of ``auto_class`` that `load` has bound to a registered model."""

        warmserve_model: Model

        def generate(self, *arguments: Any, **options: Any) -> Any: ...


__all__ = ["bind", "load", "stream_tokens"]

_blueprints = Blueprints()


def load(
    runtime: Runtime,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    dtype: str | torch.dtype | None = None,
    layers: Grouping | None = None,
    writable: bool = False,
    allow_symlinks: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str = "",
    trust_remote_code: bool = False,
    torch_dtype: str | torch.dtype | None = None,
    **config: Any,
) -> BoundModel:
    """Register a Hugging Face directory and return a module that runs on its weights in place.

    `load` reads no weights. The runtime reads them when the model is prewarmed or leased.

    Parameters
    ----------
    runtime : Runtime
        The runtime whose arena will hold the weights.
    path : str or os.PathLike
        A model directory, or the id of a model in the Hugging Face cache.
    name : str, optional
        The model's name in the runtime. Default: the name of the directory, or the id.
    dtype : torch.dtype, its name or "auto", optional
        The dtype that the module computes in. Default ("auto"): the dtype of most of the
        checkpoint's bytes, whatever its configuration says. Weights that transformers keeps in
        float32, such as some routers, are float32 here too.
    layers, writable, allow_symlinks
        As in `Runtime.register`, whatever tensors the runtime's leases hand out. If the checkpoint
        stores each expert of a mixture separately, `layers="experts"` makes each expert a layer,
        and a pass waits only for the experts that the router chose.
    auto_class : class of transformers
        The class that builds the module. A model with two stacks (T5) needs
        `AutoModelForSeq2SeqLM`. It has one axis of layers: the encoder's blocks before the
        decoder's.
    revision, variant, subfolder, trust_remote_code, torch_dtype
        As in `from_pretrained`; `torch_dtype` is the former name of `dtype`.
    **config
        Further options go into the module's configuration, such as `attn_implementation="eager"`.
        An option of `from_pretrained` that asks for something that `load` does not do is refused.

    Returns
    -------
    BoundModel
        The module in eval mode. Its `warmserve_model` is the registered model.

    Raises
    ------
    ValueError
        Parameters and tensors do not match one to one in name, shape and dtype (the message names
        the tensor); the model is quantized (the message names the method) or writes to its weights;
        or the model has two stacks and `auto_class` builds one.
    TypeError
        An option is unknown.
    Other
        Everything that `Runtime.register` raises.

    Notes
    -----
    Run the module under `with runtime.lease(module.warmserve_model)`. With `streaming=True` its
    first blocks compute while the last are still being loaded. A forward pass without a lease on
    the model raises StaleView. This holds for the whole module and for each part that is a
    transformers model itself (its `base_model`, an encoder). Any other read of the weights without
    a lease (printing a parameter, calling a block or the head) is a memory fault.

    The weights are read-only and take no gradient. The module raises TypeError for an operation
    that would change them, convert them or move them out of the arena (`half()`,
    `load_state_dict()`, merging an adapter). With `writable=True`, in-place changes are allowed
    under a lease and are lost when a layer is evicted; gradients are allowed too and use ordinary
    memory. A deep or pickled copy of the module is an ordinary module with memory of its own.
    Making a copy needs a lease, and so does `save_pretrained()`. RWKV needs `rescale_every=0`,
    because its forward pass would otherwise write to its weights.

    On CUDA a lease may end while the device still computes: each pass is recorded, and so is the
    stream that is current in torch when the lease ends. An eviction waits for both. A replay of a
    CUDA graph is no pass: call `lease.record(stream)` after a replay on another stream.

    Guarantee: strong (after an exception the model is not registered).
    """
    path = os.path.join(os.fspath(path), subfolder) if subfolder else os.fspath(path)
    wanted = dtype_name(dtype, torch_dtype)
    settings = configuration(path, config, revision=revision, trust_remote_code=trust_remote_code)
    _check_kind(path, settings, auto_class)
    source: dict[str, Any] = {"allow_symlinks": allow_symlinks}
    source |= {} if revision is None else {"revision": revision}
    source |= {} if variant is None else {"variant": variant}
    with closing(open_checkpoint(path, **source)) as opened:
        entries = opened.tensors
    casts = {} if wanted is None else planned_casts(entries, wanted)
    dtypes = {name: casts.get(name, entry.dtype) for name, entry in entries.items()}
    sizes = {
        name: (dtypes[name], entry.nbytes * dtypes[name].bits // entry.dtype.bits)
        for name, entry in entries.items()
    }
    computes_in = main_dtype(sizes, settings.dtype)

    def build() -> Blueprint:
        code = {"trust_remote_code": True} if trust_remote_code else {}
        built = skeleton(settings, computes_in, auto_class=auto_class, **code)
        moe.separate(built, names.stacked(built, entries))
        return Blueprint(built, names.targets(built, entries))

    blueprint = _blueprints.find(settings, computes_in, auto_class, entries, build)
    module = blueprint.module
    _read_generation_config(module, path, revision, trust_remote_code)
    known_as = name or (os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else path)
    # Casts are decided before registering, which compares the revisions of a name by their layout
    # in the arena, that is, after casts.
    cast_to = needed_casts(module, dtypes, blueprint.targets) or wanted
    model = runtime.register(
        known_as, path, dtype=cast_to, layers=layers, writable=writable, **source
    )
    try:
        home = Home(runtime, model, writable=writable)
        bind_targets(module, model.tensors("torch"), blueprint.targets, home)
        # Each of these parts may be called alone: generate() calls the encoder of a model with two
        # stacks directly.
        whole: Iterable[nn.Module] = module.modules()
        guard(module, runtime, model, (part for part in whole if isinstance(part, PreTrainedModel)))
        protect(module, home, blueprint.targets)
        module.warmserve_model = model  # type: ignore[assignment]
    except BaseException:
        runtime.unregister(model)
        raise
    return cast("BoundModel", module)


def _check_kind(path: str, settings: Any, auto_class: Any) -> None:
    """Raise ValueError if the model cannot compute on its file's bytes in place."""
    if method := quantization(path, settings):
        raise ValueError(
            f"{path} is quantized ({method}): transformers would replace its parameters, so the "
            "module cannot compute on the file's bytes in place"
        )
    if getattr(settings, "rescale_every", 0):
        raise ValueError(
            f"{path}: {settings.model_type} rescales its weights in place as it computes, but they "
            "are read-only: pass rescale_every=0"
        )
    if settings.is_encoder_decoder and auto_class is AutoModelForCausalLM:
        raise ValueError(
            f"{path}: {settings.model_type} has an encoder and a decoder, but AutoModelForCausalLM "
            "builds one stack: pass auto_class=transformers.AutoModelForSeq2SeqLM"
        )


def _read_generation_config(
    module: Any, path: str, revision: str | None, trust_remote_code: bool
) -> None:
    """Read the generation config as `from_pretrained` does, which tolerates a missing or broken
    file."""
    if not (module.can_generate() and hasattr(module, "adjust_generation_fn")):
        return
    where: Mapping[str, Any] = {
        "cache_dir": None,
        "force_download": False,
        "proxies": None,
        "local_files_only": True,
        "token": None,
        "revision": revision or "main",
        "subfolder": "",
    }
    module.adjust_generation_fn(
        None, False, False, path, **where, trust_remote_code=trust_remote_code
    )
