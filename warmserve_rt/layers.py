"""Tensor names to layers, layers to a layout: where every byte of a checkpoint goes.

A layer is the unit of residency: the embedding, each block, the head. Layers come in execution
order, because a model can start on its first layers while the last are still on their way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

from warmserve_rt.checkpoint import Checkpoint, DType, TensorEntry
from warmserve_rt.dtypes import cast_kind

ALIGNMENT = 256  # bytes; of each tensor in its layer, as device allocators give

Grouping: TypeAlias = (
    Literal["experts"]
    | Callable[[str], str | int]
    | Sequence[Sequence[str]]
    | Mapping[str, Sequence[str]]
)

_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,9})(?=\.|\Z)")

_EXPERT = re.compile(r"\.experts\.([0-9]{1,9})(?=\.)")

# What runs before the blocks, by the names that the common families give it. Their output
# embedding is not among it.
_EMBEDDING = re.compile(
    r"(?:^|[._])emb(?!ed_out)|(?:^|\.)(?:wte|wpe|shared|project_in|\w*projector)(?=\.|\Z)"
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
    tensors: tuple[TensorSpec, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A model's layers in execution order; `nbytes` is the sum of theirs."""

    layers: tuple[LayerSpec, ...]
    tensors: Mapping[str, TensorSpec]
    nbytes: int


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
    groups = _groups(checkpoint.tensors, grouping)
    chosen: dict[str, int] = {}
    for number, (layer, names) in enumerate(groups):
        if isinstance(names, str):
            raise TypeError(f"layer {layer!r} must be a sequence of names, not a string")
        for name in names:
            if name not in checkpoint.tensors:
                raise ValueError(f"tensor {name!r} of layer {layer!r} is not in the checkpoint")
            if name in chosen:
                first = groups[chosen[name]][0]
                raise ValueError(f"tensor {name!r} is in layer {first!r} and again in {layer!r}")
            chosen[name] = number

    members: list[list[TensorEntry]] = [[] for _ in groups]
    for name, entry in checkpoint.tensors.items():
        if name not in chosen:
            raise ValueError(f"tensor {name!r} is in no layer")
        members[chosen[name]].append(entry)

    layers: list[LayerSpec] = []
    for (layer, _), entries in zip(groups, members, strict=True):
        if entries:
            layers.append(_lay_out(layer, len(layers), entries, casts))
    return Layout(
        layers=tuple(layers),
        tensors=MappingProxyType({t.name: t for layer in layers for t in layer.tensors}),
        nbytes=sum(layer.nbytes for layer in layers),
    )


def group_by_name(sizes: Mapping[str, int]) -> list[tuple[str, list[str]]]:
    """Layers, as names and tensor names in execution order, of tensors of `sizes` bytes.

    The first number in a tensor's name is its block, and what stands before it the stack of
    blocks. The stack with the most bytes is the main one; the others (an encoder, a vision tower)
    execute before it. A name without a number goes to the layer "embedding" if it is one by its
    common names. Otherwise it executes after the stack with which it shares the longest prefix,
    in doubt the main one: after that is the layer "head", after another that stack's last block.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    loose: list[str] = []
    for name in sizes:
        if number := _NUMBER.search(name):
            blocks = stacks.setdefault(name[: number.start()], {})
            blocks.setdefault(int(number[1]), []).append(name)
        else:
            loose.append(name)

    def nbytes(stack: str) -> int:
        return sum(sizes[name] for names in stacks[stack].values() for name in names)

    main = max(stacks, key=nbytes, default="")
    order = [*(stack for stack in stacks if stack != main), main]
    owner = {prefix: stack for stack in order for prefix in _prefixes(stack)}
    embedding: list[str] = []
    head: list[str] = []
    for name in loose:
        stack = next(owner[prefix] for prefix in _prefixes(name) if prefix in owner)
        if _EMBEDDING.search(name):
            embedding.append(name)
        elif stack == main:
            head.append(name)
        else:
            stacks[stack][max(stacks[stack])].append(name)

    blocks_in_order = [
        (f"{stack}.{number}" if stack else str(number), names)
        for stack in order
        for number, names in sorted(stacks.get(stack, {}).items())
    ]
    layers = [("embedding", embedding), *blocks_in_order, ("head", head)]
    return [(layer, names) for layer, names in layers if names]


def experts_apart(layers: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """The same layers, but with each expert in one of its own, after what is left of its block.

    Its name is the block's and its number, as in "model.layers.0.experts.3". Raises ValueError if
    no tensor is an expert's alone.
    """
    apart: list[tuple[str, list[str]]] = []
    for layer, names in layers:
        rest: list[str] = []
        experts: dict[int, list[str]] = {}
        for name in names:
            number = _EXPERT.search(name)
            (experts.setdefault(int(number[1]), []) if number else rest).append(name)
        apart.append((layer, rest))
        apart += [(f"{layer}.experts.{number}", experts[number]) for number in sorted(experts)]
    if len(apart) == len(layers):
        raise ValueError(
            "layers='experts': no tensor belongs to one expert alone (a name like "
            "'experts.0.w1.weight')"
        )
    return [(layer, names) for layer, names in apart if names]


def _prefixes(name: str) -> list[str]:
    """The name, then what is left as its last parts fall off one by one, at last nothing."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _groups(
    tensors: Mapping[str, TensorEntry], grouping: Grouping | None
) -> Sequence[tuple[str, Sequence[str]]]:
    if grouping is None or grouping == "experts":
        layers = group_by_name({name: entry.nbytes for name, entry in tensors.items()})
        return experts_apart(layers) if grouping else layers
    if isinstance(grouping, Mapping):
        return [*grouping.items()]
    if isinstance(grouping, Sequence) and not isinstance(grouping, str):
        return [(str(number), names) for number, names in enumerate(grouping)]
    if not callable(grouping):
        raise TypeError(
            f"layers must be 'experts', a mapping, a sequence or a function, not {grouping!r}"
        )
    found: dict[str | int, list[str]] = {}
    for name in tensors:
        layer = grouping(name)
        if not isinstance(layer, str | int):
            raise TypeError(f"the layer of {name!r} must be a str or an int, not {layer!r}")
        found.setdefault(layer, []).append(name)
    order = sorted(found) if all(isinstance(layer, int) for layer in found) else [*found]
    return [(str(layer), found[layer]) for layer in order]


def _lay_out(
    name: str, index: int, entries: Sequence[TensorEntry], casts: Mapping[str, DType]
) -> LayerSpec:
    """One layer of tensors that come in file order."""
    tensors: list[TensorSpec] = []
    segments: list[Segment] = []
    end = 0
    source = (-1, 0)  # file, and where in it the last segment ends
    for entry in entries:
        dtype = casts.get(entry.name, entry.dtype)
        cast = None if dtype == entry.dtype else cast_kind(entry.dtype, dtype)
        nbytes = entry.nbytes * dtype.bits // entry.dtype.bits
        offset = -(-end // ALIGNMENT) * ALIGNMENT if nbytes else 0
        tensors.append(TensorSpec(entry.name, dtype, entry.shape, index, offset, nbytes))
        if not nbytes:
            continue
        goes_on = (entry.file, entry.offset) == source and offset == end
        if goes_on and segments[-1].cast == cast:
            segments[-1] = replace(segments[-1], nbytes=segments[-1].nbytes + nbytes)
        else:
            segments.append(Segment(entry.file, entry.offset, offset, nbytes, cast))
        source = (entry.file, entry.offset + entry.nbytes)
        end = offset + nbytes
    return LayerSpec(name, index, end, tuple(tensors), tuple(segments))
