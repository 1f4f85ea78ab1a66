"""Export the tensors of a torch module and bind them to another module built on meta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

_PLAIN = frozenset({bool, dict, float, int, list, set, str, tuple, type(None)})


class LayoutDiffers(ValueError):
    """The tensors of a state do not fit the module that they are bound to."""


@dataclass(frozen=True, eq=False)
class State:
    """The tensors that a module computes with, each stored once.

    Attributes
    ----------
    parameters : dict of name to tensor
        Dense and row-major. A parameter whose axes the module has in another order is stored in the
        order of its memory; ``orders`` then has the permutation of its axes.
    private : dict of name to tensor
        Buffers and plain attributes. They are small, and some modules write to them.
    aliases : dict of name to name
        Further names of a tensor, each with the name under which the tensor is stored.
    orders : dict of name to list of int
        For each parameter that is not row-major in the module: the module's axes in the order in
        which they are stored.
    attributes : set of names
        The names, out of all of the above, that are neither parameters nor buffers of the module.
    """

    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    private: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    orders: dict[str, list[int]] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)


def export(module: nn.Module) -> State:
    """Return the state of a module on a device; it shares the module's dense tensors.

    Raises ValueError, which names the parameter, for a parameter with gaps in its memory.
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
    """Replace a module's meta buffers and attributes by copies of the state's.

    Raises LayoutDiffers, which names the tensor, if the state does not have it.
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
    """Make tensors the parameters of a module, without reading or copying them.

    Parameters
    ----------
    module : nn.Module
        The module; it is changed in place.
    state : State
        The state that the tensors belong to: orders, aliases and attributes.
    tensors : mapping of name to tensor
        Tensors under the names of ``state.parameters``.
    exact : bool
        Require that the module already has a parameter of each name with the same shape and dtype.
        False: processing may have changed the parameters, and added others.

    Returns
    -------
    int
        The bytes of the tensors.

    Raises
    ------
    LayoutDiffers
        The module has no place for a tensor, or (``exact``) its shape or dtype differs.
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
                raise LayoutDiffers(f"{type(module).__name__} has no parameter {name!r}")
            if (slot.shape, slot.dtype) != (value.shape, value.dtype):
                raise LayoutDiffers(
                    f"{name!r} is {found}, but {type(module).__name__} expects {slot.dtype} "
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
    """Raise ValueError, which names the tensor, if the module still has a tensor without memory.

    This also checks the attributes of objects that a part of the module holds.
    """
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
                        "not among the exported tensors: the module cannot be bound"
                    )


def _private(
    state: State, name: str, like: torch.Tensor, made: dict[str, torch.Tensor]
) -> torch.Tensor:
    stored_as = state.aliases.get(name, name)
    if stored_as not in state.private:
        raise LayoutDiffers(f"{name!r} is missing from the exported tensors")
    value = state.private[stored_as]
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        raise LayoutDiffers(
            f"{name!r} is {value.dtype} {tuple(value.shape)}, not {like.dtype} {tuple(like.shape)}"
        )
    return made.setdefault(stored_as, value.clone())


def _is_parameter(state: State, name: str) -> bool:
    return state.aliases.get(name) in state.parameters


def _row_major(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Return the tensor with its axes in the order of its memory, and the permutation of them."""
    order = list(range(tensor.dim()))
    if not tensor.is_contiguous():
        strides: tuple[int, ...] = tensor.stride()
        order.sort(key=lambda axis: -strides[axis])
    row_major = tensor.permute(order)
    if not row_major.is_contiguous():
        raise ValueError(
            f"{name!r} must be dense, got strides {tensor.stride()}: gaps, or memory used twice"
        )
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
        raise LayoutDiffers(f"{type(module).__name__} has no module for {name!r}") from error
