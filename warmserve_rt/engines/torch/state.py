"""The tensors of a torch module, taken out of it and put into another that was built on meta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

_PLAIN = frozenset({bool, dict, float, int, list, set, str, tuple, type(None)})


class LayoutDiffers(ValueError):
    """Tensors are not those that a module has."""


@dataclass(frozen=True, eq=False)
class State:
    """What a module computes with, every tensor once.

    ``parameters`` are dense and row-major; one that the module has in another order of its axes is
    stored in the order of its memory, with the axes of that in ``orders``. ``private`` are buffers
    and plain attributes: small, and written to by some modules. ``aliases`` are further names, each
    with the name under which its tensor is there. ``attributes`` are those of all names that are
    neither parameter nor buffer.
    """

    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    private: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    orders: dict[str, list[int]] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)


def export(module: nn.Module) -> State:
    """The state of a module on a device; its tensors are shared, not copied.

    Raises ValueError, which names it, for a parameter with gaps in its memory.
    """
    state = State()
    seen: dict[object, str] = {}

    def is_new(name: str, tensor: torch.Tensor) -> bool:
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = seen.setdefault(memory if tensor.numel() else id(tensor), name)
        if first != name:
            state.aliases[name] = first
        return first == name

    for name, parameter in module.named_parameters(remove_duplicate=False):
        if is_new(name, parameter):
            tensor, order = _row_major(name, parameter.detach())
            state.parameters[name] = tensor
            if order != sorted(order):
                state.orders[name] = order
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if is_new(name, buffer):
            state.private[name] = buffer.detach().contiguous()
    for name, value in _attributes(module):
        state.attributes.add(name)
        if is_new(name, value):
            state.private[name] = value.detach().contiguous()
    return state


def bind_private(module: nn.Module, state: State) -> None:
    """Gives a module the buffers and attributes that it lacks, in memory of their own.

    Raises LayoutDiffers, which names it, for one of the module's that the state has not.
    """
    made: dict[str, torch.Tensor] = {}
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if buffer.is_meta:
            owner, leaf = _owner(module, name)
            owner._buffers[leaf] = _private(state, name, buffer, made)
    for name, value in _attributes(module):
        if value.is_meta and not _is_parameter(state, name):
            owner, leaf = _owner(module, name)
            vars(owner)[leaf] = _private(state, name, value, made)


def bind_parameters(
    module: nn.Module, state: State, tensors: Mapping[str, torch.Tensor], *, exact: bool
) -> int:
    """Makes ``tensors``, by the names of ``state.parameters``, the module's; returns their bytes.

    Nothing is read or copied. ``exact``: the module was built with just these shapes and dtypes;
    otherwise processing may have changed them, and brought others. Raises LayoutDiffers.
    """
    slots = dict(module.named_parameters(remove_duplicate=False))
    bound: dict[str, nn.Parameter] = {}
    for name, stored in tensors.items():
        order = state.orders.get(name)
        view = stored if order is None else stored.permute(_inverse(order))
        bound[name] = nn.Parameter(view, requires_grad=False)
    names = {name: name for name in bound}
    names |= {alias: name for alias, name in state.aliases.items() if name in bound}
    for name, stored_as in names.items():
        value, slot = bound[stored_as], slots.get(name)
        if exact and name not in state.attributes:
            found = f"{value.dtype} {tuple(value.shape)}"
            if slot is None:
                raise LayoutDiffers(f"{name!r} is no parameter of {type(module).__name__}")
            if (slot.shape, slot.dtype) != (value.shape, value.dtype):
                raise LayoutDiffers(
                    f"{name!r} is {found}, and {type(module).__name__} has {slot.dtype} "
                    f"{tuple(slot.shape)}"
                )
        owner, leaf = _owner(module, name)
        if name in state.attributes:
            vars(owner)[leaf] = value
        else:
            owner._buffers.pop(leaf, None)
            owner._parameters[leaf] = value
    return sum(value.nbytes for value in bound.values())


def refuse_meta(module: nn.Module) -> None:
    """Raises ValueError, which names it, for a tensor that still has no memory; also for one of an
    object that a part of the module keeps."""
    asked: set[int] = set()  # many parts share one object, such as a configuration
    for path, part in module.named_modules():
        for name, value in (*part._parameters.items(), *part._buffers.items(), *vars(part).items()):
            if type(value) in _PLAIN:
                continue
            found = [(name, value)]
            if not isinstance(value, nn.Module | torch.Tensor) and id(value) not in asked:
                asked.add(id(value))
                inner = getattr(value, "__dict__", {})
                found += [(f"{name}.{leaf}", each) for leaf, each in inner.items()]
            for leaf, tensor in found:
                if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                    raise ValueError(
                        f"{type(module).__name__} has {f'{path}.{leaf}'.lstrip('.')!r}, which is "
                        "not among the tensors that were taken out of it: it cannot be bound"
                    )


def _private(
    state: State, name: str, like: torch.Tensor, made: dict[str, torch.Tensor]
) -> torch.Tensor:
    stored_as = state.aliases.get(name, name)
    if stored_as not in state.private:
        raise LayoutDiffers(f"{name!r} is not there")
    value = state.private[stored_as]
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        raise LayoutDiffers(
            f"{name!r} is {value.dtype} {tuple(value.shape)}, not {like.dtype} {tuple(like.shape)}"
        )
    return made.setdefault(stored_as, value.clone())


def _is_parameter(state: State, name: str) -> bool:
    return state.aliases.get(name) in state.parameters


def _row_major(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The tensor with its axes in the order of its memory, and which axis of its own each is."""
    order = list(range(tensor.dim()))
    if not tensor.is_contiguous():
        strides: tuple[int, ...] = tensor.stride()
        order.sort(key=lambda axis: -strides[axis])
    row_major = tensor.permute(order)
    if not row_major.is_contiguous():
        raise ValueError(f"{name!r} has strides {tensor.stride()}: gaps, or memory used twice")
    return row_major, order


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda axis: order[axis])


def _attributes(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, part in module.named_modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}".lstrip("."), value


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    try:
        return module.get_submodule(parent), leaf
    except AttributeError as error:
        raise LayoutDiffers(f"{type(module).__name__} has no part for {name!r}") from error
