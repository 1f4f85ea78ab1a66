"""Group tensors into layers, and lay out the layers: the place of every byte of a checkpoint.

A layer is the unit of residency: the embedding, each block, the head. Layers are in execution
order, because a model can start on its first layers while the last are still loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import starmap
from operator import eq
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

from warmserve_rt import _native

from . import CHUNK, TYPES, Checkpoint, DType, Tensors

_Row = TypeVar("_Row")

ALIGNMENT = 256  # bytes, of each tensor's offset in its layer, as in device allocators

Grouping: TypeAlias = (
    Literal["experts"]
    | Callable[[str], str | int]
    | Sequence[Sequence[str]]
    | Mapping[str, Sequence[str]]
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A copy from `file_offset` of file number `file` to `layer_offset` of the layer.

    `nbytes` counts bytes in the layer. With a `cast`, one of `kernels.CASTS`, the file's bytes may
    be more or fewer.
    """

    file: int
    file_offset: int
    layer_offset: int
    nbytes: int
    cast: str | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor at byte `offset`, a multiple of ALIGNMENT, of layer number `layer`.

    `dtype` and `nbytes` are those in the layer, after a cast. An empty tensor is at offset 0 and
    takes no room.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    layer: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer: its tensors in file order and the copies that fill them. `nbytes` ends with the last
    tensor."""

    name: str
    index: int
    nbytes: int
    tensors: Sequence[TensorSpec]
    segments: Sequence[Segment]


class Layout:
    """A model's layers in execution order; `nbytes` is the sum of theirs.

    Native code keeps them. `layers` and `tensors` are made on first access, because a runtime
    registers and loads a model without them. A layer's own tensors are made at each access.
    """

    def __init__(self, native: _native.Layout) -> None:
        self.native = native

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.native)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.layers == other.layers

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Layout: {len(self)} layers, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        return self.native.nbytes

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(self._layer(index) for index in range(len(self)))

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return MappingProxyType({t.name: t for layer in self.layers for t in layer.tensors})

    @cached_property
    def index_of(self) -> Mapping[str, int]:
        """The index of each layer by its name, the first index of a repeated name."""
        count = len(self)
        names = (self.native.layer(index)[0] for index in reversed(range(count)))
        return dict(zip(names, reversed(range(count)), strict=True))

    def _layer(self, index: int) -> LayerSpec:
        name, nbytes, tensors, segments = self.native.layer(index)
        return LayerSpec(
            name,
            index,
            nbytes,
            _Rows(tensors, partial(self.native.tensors, index), _tensor),
            _Rows(segments, partial(self.native.segments, index), Segment),
        )


def _tensor(
    name: str, dtype: int, shape: tuple[int, ...], layer: int, offset: int, nbytes: int
) -> TensorSpec:
    return TensorSpec(name, TYPES[dtype], shape, layer, offset, nbytes)


class _Rows(Sequence[_Row]):
    """The rows of a native table, each made on access: a layer may have a million."""

    __slots__ = ("_count", "_make", "_rows")

    def __init__(
        self,
        count: int,
        rows: Callable[[int, int], Sequence[tuple[Any, ...]]],
        make: Callable[..., _Row],
    ) -> None:
        self._count, self._rows, self._make = count, rows, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> _Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_Row]: ...
    def __getitem__(self, index: int | slice) -> _Row | Sequence[_Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        at = range(self._count)[index]
        return self._make(*self._rows(at, at + 1)[0])

    def __iter__(self) -> Iterator[_Row]:
        for first in range(0, self._count, CHUNK):
            yield from starmap(self._make, self._rows(first, first + CHUNK))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Rows | tuple):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def build_layout(
    checkpoint: Checkpoint,
    grouping: Grouping | None = None,
    casts: Mapping[str, DType] = MappingProxyType({}),
    *,
    granule: int = 1,
    max_padding: float = 1.0,
) -> Layout:
    """Lay out every tensor of a checkpoint in exactly one layer.

    A layer without tensors is omitted. The tensors of a layer are in the order of the files rather
    than the caller's, so that tensors that are adjacent in a file are copied together.

    Parameters
    ----------
    checkpoint : Checkpoint
    grouping : optional
        Which tensors form a layer, and the execution order of the layers:

        - None: by the tensors' names, as `group_by_name` does;
        - "experts": the same, but each expert that has tensors of its own is a layer, after the
          rest of its block;
        - a mapping from a layer's name to its tensors' names, in execution order;
        - a sequence of sequences of tensor names, in execution order; the layers are named "0",
          "1", ...;
        - a function from a tensor's name to its layer. Numbered layers execute in their order,
          others in the order in which the checkpoint's files first need them.
    casts : mapping from tensor names to dtypes
        The tensors to cast: see `dtypes.planned_casts`.
    granule : int
        Bytes of a granule.
    max_padding : float
        The largest share of a layer's granules that its tensors may leave unused, 0 to 1. If the
        caller does not group the tensors, a layer that leaves more is merged with the layers that
        follow it, until the merged layer leaves less; the last layers are merged with those before
        them. Only a model that is one merged layer may leave more. A merged layer is named after
        its first and last parts, as in "model.layers.0 to model.layers.3". Default: merge none.

    Raises
    ------
    ValueError
        A tensor is omitted, repeated or not in the checkpoint (the message names it); or "experts"
        for a checkpoint in which no expert has tensors of its own.
    TypeError
        `grouping` is none of the above.
    """
    table = checkpoint.tensors.native
    types = _types(checkpoint.tensors, casts)
    if grouping is None or isinstance(grouping, str):
        if grouping not in (None, "experts"):
            raise TypeError(_WRONG_GROUPING.format(grouping))
        experts = grouping == "experts"
        return Layout(_native.lay_out_by_name(table, experts, types, granule, max_padding))
    groups = _groups(checkpoint.tensors, grouping)
    group_of = np.full(len(table), len(groups), np.uint32)  # by the tensor's number
    for number, (layer, names) in enumerate(groups):
        if isinstance(names, str):
            raise TypeError(f"layer {layer!r} must be a sequence of names, got a string")
        for name in names:
            tensor = table.find(name) if isinstance(name, str) else None
            if tensor is None:
                raise ValueError(f"tensor {name!r} of layer {layer!r} is not in the checkpoint")
            if (before := int(group_of[tensor])) < len(groups):
                first = groups[before][0]
                raise ValueError(f"tensor {name!r} is in layer {first!r} and again in {layer!r}")
            group_of[tensor] = number
    if len(missing := np.flatnonzero(group_of == len(groups))):
        name = table.entry(int(missing[0]))[0]
        raise ValueError(f"tensor {name!r} is in no layer")
    return Layout(_native.lay_out_groups(table, [layer for layer, _ in groups], group_of, types))


def group_by_name(sizes: Mapping[str, int]) -> list[tuple[str, list[str]]]:
    """Group tensors of `sizes` bytes into layers: (name, tensor names) in execution order.

    The first number in a tensor's name is its block, and the text before the number is its stack of
    blocks. The stack with the most bytes is the main stack. The others (an encoder, a vision tower)
    execute before it. A tensor without a number belongs to the layer "embedding" if it has one of
    the common names of embeddings. Otherwise it executes after the stack with which it shares the
    longest prefix, or after the main stack if it shares none. After the main stack it belongs to
    the layer "head", after another stack to that stack's last block.
    """
    return _native.TensorTable([*sizes], [*sizes.values()]).groups()


def _types(tensors: Tensors, casts: Mapping[str, DType]) -> npt.NDArray[np.uint8]:
    """Return the dtype of each tensor in the arena by its number; empty if no tensor is cast."""
    if not casts:
        return np.empty(0, np.uint8)
    types = tensors.native.types()
    for name, dtype in casts.items():
        number = tensors.native.find(name)
        if number is not None:
            types[number] = TYPES.index(dtype)
    return types


_WRONG_GROUPING = "layers must be 'experts', a mapping, a sequence or a function, got {!r}"


def _groups(
    tensors: Tensors,
    grouping: Mapping[str, Sequence[str]] | Sequence[Sequence[str]] | Callable[[str], str | int],
) -> Sequence[tuple[str, Sequence[str]]]:
    if isinstance(grouping, Mapping):
        return [*grouping.items()]
    if isinstance(grouping, Sequence):
        return [(str(number), names) for number, names in enumerate(grouping)]
    if not callable(grouping):
        raise TypeError(_WRONG_GROUPING.format(grouping))
    found: dict[str | int, list[str]] = {}
    for name in tensors:
        layer = grouping(name)
        if not isinstance(layer, str | int):
            raise TypeError(f"the layer of {name!r} must be a str or an int, got {layer!r}")
        found.setdefault(layer, []).append(name)
    order = sorted(found) if all(isinstance(layer, int) for layer in found) else [*found]
    return [(str(layer), found[layer]) for layer in order]
