"""Selections of layers: the first n, or any set of them by index or name."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, SupportsIndex, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from warmserve_rt.checkpoint.layout import Layout

Layers: TypeAlias = int | slice | Iterable[int | str]
"""``4``: the first four. A slice, a range, or indices and names of layers in any order."""


class Layered(Protocol):
    """A model, seen as its name and its layers."""

    @property
    def name(self) -> str: ...
    @property
    def layout(self) -> Layout: ...


def layer_index(model: Layered, layer: int | str) -> int:
    """Return the index of a layer that is given by index or name.

    Raises ValueError if the model has no such layer, TypeError if ``layer`` is neither an integer
    (numpy's are accepted) nor a name.
    """
    return index_in(model.layout, model.name, layer)


def index_in(layout: Layout, name: str, layer: int | str) -> int:
    """Return the index of a layer as `layer_index` does; ``name`` is the model's, for messages."""
    count = len(layout)
    if isinstance(layer, str):
        index = layout.index_of.get(layer, count)
    else:
        index = _integer(layer, "layer must be an index or a name")
    if not 0 <= index < count:
        raise ValueError(f"{name!r} has no layer {layer!r}: it has {count} layers")
    return index


def layer_indices(model: Layered, layers: Layers | None) -> list[int] | None:
    """Return the indices in ascending order, or None for None, which means all layers.

    Raises ValueError if a layer is unknown or named twice or if none is named, TypeError if
    ``layers`` has another type.
    """
    if layers is None:
        return None
    found = _indices(model, layers)
    if not found:
        raise ValueError(f"layers must name at least one layer of {model.name!r}")
    return found


def all_but(model: Layered, keep: Layers) -> list[int]:
    """Return all layers except those of ``keep``, which may be empty. Raises as
    :func:`layer_indices`."""
    kept = set(_indices(model, keep))
    return [index for index in range(len(model.layout)) if index not in kept]


def _indices(model: Layered, layers: Layers) -> list[int]:
    count = len(model.layout)
    if isinstance(layers, slice):
        return sorted(range(count)[layers])
    if isinstance(layers, str):
        raise TypeError(
            f"layers must be a number or a list of indices and names, got the name {layers!r}: "
            f"write [{layers!r}]"
        )
    if not isinstance(layers, Iterable) or (isinstance(layers, np.ndarray) and not layers.ndim):
        first = _integer(layers, "layers must be a number, a slice or a list of indices and names")
        if not 0 <= first <= count:
            raise ValueError(f"layers of {model.name!r} must be from 0 to {count}, got {first}")
        return list(range(first))
    indices = sorted(layer_index(model, layer) for layer in layers)
    for index, following in pairwise(indices):
        if index == following:
            name = model.layout.native.layer(index)[0]
            raise ValueError(f"layer {name!r} of {model.name!r} is named twice")
    return indices


def _integer(value: SupportsIndex, rule: str) -> int:
    """Return an int or a numpy integer as an int; refuse other types and bools."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{rule}, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:  # arrays of several numbers have __index__ too
        raise TypeError(f"{rule}, got {value!r}") from None
