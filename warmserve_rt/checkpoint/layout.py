"""Tensor names to layers, layers to a layout: where every byte of a checkpoint goes.

A layer is the unit of residency: the embedding, each block, the head. Layers come in execution
order, because a model can start on its first layers while the last are still on their way.
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

ALIGNMENT = 256  # bytes; of each tensor in its layer, as device allocators give

Grouping: TypeAlias = (
    Literal["experts"]
    | Callable[[str], str | int]
    | Sequence[Sequence[str]]
    | Mapping[str, Sequence[str]]
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A copy from `file_offset` of file number `file` to `layer_offset` of the layer.

    `nbytes` are the layer's; the file's too, unless `cast`, one of `kernels.CASTS`, says otherwise.
    """

    file: int
    file_offset: int
    layer_offset: int
    nbytes: int
    cast: str | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor at byte `offset` of layer number `layer`, a multiple of ALIGNMENT.

    What it is there, cast or as in its file. An empty tensor is at offset 0 and takes no room.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    layer: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Tensors in file order, and the copies that fill them; `nbytes` ends with the last tensor."""

    name: str
    index: int
    nbytes: int
    tensors: Sequence[TensorSpec]
    segments: Sequence[Segment]


class Layout:
    """A model's layers in execution order; `nbytes` is the sum of theirs.

    Native code keeps them. `layers` and `tensors` are made when they are first asked for, because a
    runtime registers and loads a model without them. A layer's own tensors are made at each look.
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
        """The index of each layer by its name; of equal names the first."""
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
    """The rows of a native table, each made when it is asked for: a layer may have a million."""

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
) -> Layout:
    """Lay out every tensor of a checkpoint in exactly one layer.

    `grouping` says which tensors make a layer, and in which order the layers execute:

    - None: by the names, as `group_by_name` does;
    - "experts": the same, but each expert that has tensors of its own is a layer, after the rest of
      its block;
    - a mapping from a layer's name to its tensors' names, in order of execution;
    - a sequence of sequences of tensor names, in order; the layers are named "0", "1", ...;
    - a function from a tensor's name to its layer. Layers that are numbers execute in their
      order, others in the order in which the checkpoint's files first need them.

    A layer without tensors is left out. The order of the tensors in a layer is the files' and not
    the caller's, so that neighbours there are copied together.

    `casts` says what becomes of tensors that are not kept as they are: see `dtypes.planned_casts`.
    Layers are the same with and without.

    Raises ValueError, which names the tensor, if one is left out, repeated or not in the
    checkpoint; ValueError for "experts" where none has tensors of its own; TypeError if `grouping`
    is none of the above.
    """
    table = checkpoint.tensors.native
    types = _types(checkpoint.tensors, casts)
    if grouping is None or isinstance(grouping, str):
        if grouping not in (None, "experts"):
            raise TypeError(_WRONG_GROUPING.format(grouping))
        return Layout(_native.lay_out_by_name(table, grouping == "experts", types))
    groups = _groups(checkpoint.tensors, grouping)
    group_of = np.full(len(table), len(groups), np.uint32)  # by the tensor's number
    for number, (layer, names) in enumerate(groups):
        if isinstance(names, str):
            raise TypeError(f"layer {layer!r} must be a sequence of names, not a string")
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
    """Layers, as names and tensor names in execution order, of tensors of `sizes` bytes.

    The first number in a tensor's name is its block, and what stands before it the stack of
    blocks. The stack with the most bytes is the main one; the others (an encoder, a vision tower)
    execute before it. A name without a number goes to the layer "embedding" if it is one by its
    common names. Otherwise it executes after the stack with which it shares the longest prefix,
    in doubt the main one: after that is the layer "head", after another that stack's last block.
    """
    return _native.TensorTable([*sizes], [*sizes.values()]).groups()


def _types(tensors: Tensors, casts: Mapping[str, DType]) -> npt.NDArray[np.uint8]:
    """The dtype of each tensor in the arena, by its number; nothing where none is cast."""
    if not casts:
        return np.empty(0, np.uint8)
    types = tensors.native.types()
    for name, dtype in casts.items():
        number = tensors.native.find(name)
        if number is not None:
            types[number] = TYPES.index(dtype)
    return types


_WRONG_GROUPING = "layers must be 'experts', a mapping, a sequence or a function, not {!r}"


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
            raise TypeError(f"the layer of {name!r} must be a str or an int, not {layer!r}")
        found.setdefault(layer, []).append(name)
    order = sorted(found) if all(isinstance(layer, int) for layer in found) else [*found]
    return [(str(layer), found[layer]) for layer in order]
