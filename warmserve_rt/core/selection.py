"""Which layers are meant: the first so many, or any set of them by index or name."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, SupportsIndex, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from warmserve_rt.checkpoint.layout import Layout

    from .model import Model

Layers: TypeAlias = int | slice | Iterable[int | str]
"""``4``: the first four. A slice, a range, or indices and names of layers in any order."""


def layer_index(model: Model, layer: int | str) -> int:
    """Return the index of a layer that is given by index or name.

    Raises ValueError if there is no such layer, TypeError if ``layer`` is neither an integer (a
    numpy integer is one) nor a name.
    """
    return index_in(model.layout, model.name, layer)


def index_in(layout: Layout, name: str, layer: int | str) -> int:
    """Return the index of a layer in the layout of a model of that name, as `layer_index` does."""
    count = len(layout)
    if isinstance(layer, str):
        index = layout.index_of.get(layer, count)
    else:
        index = _integer(layer, "a layer is an index or a name")
    if not 0 <= index < count:
        raise ValueError(f"{name!r} has {count} layers, no layer {layer!r}")
    return index


def layer_indices(model: Model, layers: Layers | None) -> list[int] | None:
    """Return ascending indices; None for None, which means all layers.

    Raises ValueError for a layer that is not there or is named twice, and if no layer is named;
    TypeError for what names no layers.
    """
    if layers is None:
        return None
    found = _indices(model, layers)
    if not found:
        raise ValueError(f"no layers of {model.name!r} are named")
    return found


def all_but(model: Model, keep: Layers) -> list[int]:
    """Return the other layers; ``keep`` may name none. Raises as :func:`layer_indices`."""
    kept = set(_indices(model, keep))
    return [index for index in range(len(model.layout)) if index not in kept]


def _indices(model: Model, layers: Layers) -> list[int]:
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
            raise ValueError(f"the first {first} layers of {model.name!r}, which has {count}")
        return list(range(first))
    indices = sorted(layer_index(model, layer) for layer in layers)
    for index, following in pairwise(indices):
        if index == following:
            name = model.layout.native.layer(index)[0]
            raise ValueError(f"layer {name!r} of {model.name!r} is named twice")
    return indices


def _integer(value: SupportsIndex, rule: str) -> int:
    """Return an int or a numpy integer as an int; refuse what is neither, and bools."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{rule}, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:  # an array of several numbers has the method too
        raise TypeError(f"{rule}, got {value!r}") from None
