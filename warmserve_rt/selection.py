"""Which layers are meant: the first so many, or any set of them by index or name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .model import Model

Layers: TypeAlias = int | slice | Iterable[int | str]
"""``4``: the first four. A slice, a range, or indices and names of layers in any order."""


def layer_index(model: Model, layer: int | str) -> int:
    """Of a layer by index or name. Raises ValueError where there is none."""
    if isinstance(layer, str):
        for spec in model.layers:
            if spec.name == layer:
                return spec.index
    elif 0 <= layer < len(model.layers):
        return int(layer)
    raise ValueError(f"{model.name!r} has {len(model.layers)} layers, no layer {layer!r}")


def layer_indices(model: Model, layers: Layers | None) -> list[int] | None:
    """Ascending; None for None, which means all of them.

    Raises ValueError for a layer that is not there or is named twice, and for none at all.
    """
    if layers is None:
        return None
    found = _indices(model, layers)
    if not found:
        raise ValueError(f"no layers of {model.name!r} are named")
    return found


def all_but(model: Model, keep: Layers) -> list[int]:
    """The other layers; ``keep`` may name none. Raises ValueError as :func:`layer_indices`."""
    kept = set(_indices(model, keep))
    return [index for index in range(len(model.layers)) if index not in kept]


def _indices(model: Model, layers: Layers) -> list[int]:
    count = len(model.layers)
    if isinstance(layers, slice):
        return sorted(range(count)[layers])
    if isinstance(layers, int):
        if not 0 <= layers <= count:
            raise ValueError(f"the first {layers} layers of {model.name!r}, which has {count}")
        return list(range(layers))
    if isinstance(layers, str):
        raise TypeError(f"layers must be a number or a set, not the name {layers!r}")
    indices = [layer_index(model, layer) for layer in layers]
    for index in indices:
        if indices.count(index) > 1:
            raise ValueError(f"layer {model.layers[index].name!r} of {model.name!r} is named twice")
    return sorted(indices)
