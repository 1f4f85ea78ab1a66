"""Modules whose weights are in an arena: they refuse what would move the weights out of it.

Conversions of a module go through ``Module._apply`` and state through
``Module._load_from_state_dict``, so each part of a bound module overrides these two. The tensors
check the operations on themselves (:mod:`.arena_tensors`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .arena_tensors import ArenaParameter, ArenaTensor, Home, InArena
from .moe import Experts

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_GATES = "warmserve_rt.engines.torch.gates"


def protect(module: nn.Module, home: Home, names: Mapping[str, str]) -> None:
    """Make each part of a module refuse operations that would move its weights out of the arena.

    Parameters
    ----------
    module : nn.Module
        A module whose weights are in the arena; it is changed in place.
    home : Home
        The model and its rules.
    names : mapping of name to name
        The checkpoint's name of each parameter or buffer that the checkpoint has.

    Notes
    -----
    A deep or pickled copy is an ordinary module with memory of its own and without gates. Making a
    copy reads the weights, and so does `save_pretrained`; both raise StaleView without a lease.
    """
    for part in module.modules():
        own = vars(part)
        own["_apply"] = partial(_apply, part, home)
        own["_load_from_state_dict"] = partial(_load_from_state_dict, part, home)
        own["__deepcopy__"] = partial(_deepcopy, part, home)
        own["__reduce_ex__"] = partial(_reduce, part)
        if isinstance(part, PreTrainedModel):
            own["save_pretrained"] = partial(
                _save_pretrained, part, home, names if part is module else None
            )
            own["resize_token_embeddings"] = partial(_resize_token_embeddings, part, home)
            own["tie_weights"] = _tie_weights


_OVERRIDDEN = {
    "forward",
    "_apply",
    "_load_from_state_dict",
    "__deepcopy__",
    "__reduce_ex__",
    "save_pretrained",
    "resize_token_embeddings",
    "tie_weights",
    "warmserve_model",
}


def _apply(part: Any, home: Home, change: Callable[[Any], Any], recurse: bool = True) -> Any:
    """Convert the tensors outside the arena. Refuses a conversion that would change the weights."""
    tensors: tuple[Any, ...] = (*part.parameters(recurse), *part.buffers(recurse))
    for tensor in tensors:
        if not isinstance(tensor, ArenaTensor | ArenaParameter):
            continue
        # We try the conversion on a tensor without elements, so no weight is read.
        probe: Any = torch.empty((0,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)
        shared = probe.is_shared()
        if change(probe) is not probe or probe.is_shared() != shared:
            raise home.refuse("converting or moving", "pass dtype to load(), or ")
    return type(part)._apply(
        part, lambda tensor: tensor if isinstance(tensor, InArena) else change(tensor), recurse
    )


def _load_from_state_dict(
    part: Any, home: Home, state: Any, prefix: str, metadata: Any, *arguments: Any
) -> None:
    own = (*part._parameters.items(), *part._buffers.items())
    if any(isinstance(each, InArena) and prefix + name in state for name, each in own):
        home.check_writable("load_state_dict()")
        if metadata.get("assign_to_params_buffers"):
            raise home.refuse("load_state_dict(assign=True)", "leave out assign, or ")
    type(part)._load_from_state_dict(part, state, prefix, metadata, *arguments)


def _deepcopy(part: Any, home: Home, memo: dict[int, Any]) -> Any:
    with home.reading("copy it"):
        made = object.__new__(type(part))
        memo[id(part)] = made
        state = {key: value for key, value in vars(part).items() if key not in _OVERRIDDEN}
        for kind in _HOOKS:
            hooks = state[kind].items()
            kept = {key: hook for key, hook in hooks if getattr(hook, "__module__", None) != _GATES}
            state[kind] = type(state[kind])(kept)
        for flags in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            known = state["_forward_hooks"].keys()
            state[flags] = type(state[flags])((k, v) for k, v in state[flags].items() if k in known)
        made.__setstate__(copy.deepcopy(state, memo))
    return made


def _reduce(part: Any, protocol: Any) -> Any:
    return copy.deepcopy(part).__reduce_ex__(protocol)


def _save_pretrained(
    part: Any, home: Home, names: Mapping[str, str] | None, *arguments: Any, **options: Any
) -> Any:
    if any(isinstance(each, Experts) for each in part.modules()):
        # For unstacked experts transformers accepts only the names of the checkpoint, and we know
        # those of the whole module only.
        if names is None:
            raise TypeError(
                "a part with unstacked experts cannot be saved alone: save the module instead"
            )
        state = part.state_dict().items()
        found = {names[target]: tensor for target, tensor in state if target in names}
        options = {"state_dict": found, **options, "save_original_format": False}
    with home.reading("save it"):
        return type(part).save_pretrained(part, *arguments, **options)


def _resize_token_embeddings(
    part: Any, home: Home, new_num_tokens: int | None = None, *arguments: Any, **options: Any
) -> Any:
    embeddings = part.get_input_embeddings()
    if new_num_tokens in (None, embeddings.weight.shape[0]):
        return embeddings
    raise home.refuse("resize_token_embeddings()")


def _tie_weights(*arguments: Any, **options: Any) -> None:
    """Do nothing: binding has tied the weights as the checkpoint has them."""
