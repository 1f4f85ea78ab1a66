"""Maps the tensor names of a checkpoint to the names of a transformers module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from . import moe


def targets(module: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return the checkpoint's name of each parameter or buffer that the checkpoint has.

    transformers renames some tensors on load, which works with views. It fuses or splits others,
    which does not.

    Parameters
    ----------
    module : PreTrainedModel
        The module, with parameters on the meta device.
    names : iterable of str
        The names in the checkpoint.

    Raises
    ------
    ValueError
        A tensor would be fused or split, has no place in the module, or has the same place as
        another. The message names the tensor.
    """
    state = module.state_dict(keep_vars=True)
    found: dict[str, str] = {}
    unused: dict[str, str] = {}
    for name, target, part in _renamed(module, names, state):
        if part in state:
            target = part
        elif part is not None and target in state:
            raise ValueError(
                f"tensor {name!r} is only a part of {target!r}, the parameter of "
                f"{type(module).__name__}: save the model again with save_original_format=False"
            )
        if target not in state:
            unused[target] = name
        elif found.setdefault(target, name) != name:
            raise ValueError(f"tensors {found[target]!r} and {name!r} both map to {target!r}")
    # transformers knows leftovers of old versions that are harmless, and removes them here.
    keys = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unused))
    module._adjust_missing_and_unexpected_keys(keys)  # type: ignore[arg-type]
    for target in sorted(keys.unexpected_keys):
        raise ValueError(f"tensor {unused[target]!r} has no place in {type(module).__name__}")
    return found


def stacked(module: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Return the paths of the modules whose experts the checkpoint stores separately."""
    names = [name for name in names if moe.is_of_one(name)]
    if not names:
        return set()
    state = module.state_dict(keep_vars=True)
    renamed = _renamed(module, names, state)
    return {target.rpartition(".")[0] for _, target, part in renamed if part and target in state}


def _renamed(
    module: PreTrainedModel, names: Iterable[str], state: dict[str, Any]
) -> Iterator[tuple[str, str, str | None]]:
    """Yield each name of a checkpoint, its target and its part.

    The target is the parameter that transformers makes of the tensor. The part is None if the
    tensor is all of the target. Otherwise it is the tensor's name in `moe.Experts`, or "" if the
    target is not a stack of experts.
    """
    transforms = get_model_conversion_mapping(module)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix = module.base_model_prefix
    for name in names:
        target, converted = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, converted = name, None
        part = None
        if converted is not None:
            part = moe.part_of(name, target, converted, converters) or ""
        yield name, target, part
