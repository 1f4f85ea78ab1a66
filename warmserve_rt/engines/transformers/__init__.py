"""Hugging Face transformers models that compute on weights in a runtime's memory.

Nothing is copied. A module is built without memory for its weights, and each parameter becomes a
view at the address where the runtime will put that tensor. So each tensor must be in the arena just
as the module wants it: weights that transformers would cast are cast while they are loaded, and a
checkpoint that it would first have to fuse or split is refused. Experts that it would stack are
computed with one by one instead.
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
from .binding import bind, bind_targets, main_dtype, needed_casts
from .blueprints import Blueprint, Blueprints
from .options import configuration, dtype_name, quantization
from .skeletons import skeleton
from .token_stream import stream_tokens
from .weights import Home, protect

if TYPE_CHECKING:
    from warmserve_rt.checkpoint.layout import Grouping
    from warmserve_rt.core.runtime import Model, Runtime

    class BoundModel(PreTrainedModel):  # type: ignore[no-untyped-call]
        """What `load` returns: a module of ``auto_class``, bound to a registered model."""

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

    No weight is read: that happens when the model is prewarmed or leased. Run the module under
    `with runtime.lease(module.warmserve_model)`; with `streaming=True` its first blocks compute
    while the last are still loaded. A forward pass raises StaleView while no lease on the model is
    held, whether of the whole module or of a part that is a transformers model itself (its
    `base_model`, an encoder); other ways to read its weights then (printing a parameter, calling a
    block or the head) are faults.

    The weights are read-only and take no gradient, and the module raises TypeError instead of
    changing them, converting them or moving them out of the arena (`half()`, `load_state_dict()`,
    merging an adapter). With `writable=True`, in-place changes are allowed under a lease and are
    lost when a layer is evicted; gradients are allowed too, and are ordinary memory. A deep or
    pickled copy of the module is an ordinary one with memory of its own; making one needs a lease,
    as `save_pretrained()` does. RWKV would write to its weights in its forward pass: it wants
    `rescale_every=0`.

    On CUDA a lease may end while the device still computes: each pass is recorded, and an eviction
    waits for it. Replays of a CUDA graph are not: say `lease.record(stream)` after them.

    `name` is the model's in the runtime, by default the directory's. `layers`, `writable` and
    `allow_symlinks` are as in `Runtime.register`, whatever tensors the runtime's leases hand out.
    `auto_class` is the transformers class that builds the module. Other arguments
    (`attn_implementation="eager"`) go into its configuration. Options of `from_pretrained` that ask
    for something else than `load` does are refused. The module computes in `dtype`, a torch.dtype
    or its name, or by default ("auto") in the dtype that most of the checkpoint's bytes have,
    whatever its configuration says; weights that transformers keeps in float32, such as some
    routers, are float32 here too.

    Where the checkpoint has each expert of a mixture by itself, `layers="experts"` makes each a
    layer of its own, and a pass waits only for those that the router chose. A model of two stacks
    (T5) has one axis of layers, the encoder's blocks before the decoder's, and wants
    `auto_class=AutoModelForSeq2SeqLM`.

    Raises ValueError, which names the tensor, if parameters and tensors do not match one to one
    in name, shape and dtype; ValueError for a quantized model, which names the method, for one that
    writes to its weights, and for two stacks where `auto_class` wants one; TypeError for an unknown
    option; and what `Runtime.register` raises. The model is then not registered.
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
    # The casts come first: revisions of a name are compared as they will lie in the arena.
    cast_to = needed_casts(module, dtypes, blueprint.targets) or wanted
    model = runtime.register(
        known_as, path, dtype=cast_to, layers=layers, writable=writable, **source
    )
    try:
        home = Home(runtime, model, writable=writable)
        bind_targets(module, model.tensors("torch"), blueprint.targets, home)
        # Each of these has a call of its own: generate() calls the encoder of two stacks by itself.
        whole: Iterable[nn.Module] = module.modules()
        guard(module, runtime, model, (part for part in whole if isinstance(part, PreTrainedModel)))
        protect(module, home, blueprint.targets)
        module.warmserve_model = model  # type: ignore[assignment]
    except BaseException:
        runtime.unregister(model)
        raise
    return cast("BoundModel", module)


def _check_kind(path: str, settings: Any, auto_class: Any) -> None:
    """Raise ValueError for a model that cannot compute on its file's bytes."""
    if method := quantization(path, settings):
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


def _read_generation_config(
    module: Any, path: str, revision: str | None, trust_remote_code: bool
) -> None:
    """Read it as `from_pretrained` does, which survives a file that is missing or broken."""
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
