"""Parameters and buffers in an arena, which refuse to be overwritten or moved.

torch has many such operations, but they pass through few functions. In-place methods, ``data``,
``requires_grad``, copying and pickling belong to the tensor, so a tensor class checks them; the
others belong to the module (:mod:`.arena_modules`). No operation of a forward pass is slower.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from warmserve_rt._errors import StaleView

if TYPE_CHECKING:
    from warmserve_rt.core.model import Model
    from warmserve_rt.core.runtime import Runtime


class Home:
    """The model whose memory holds a module's weights, and the checks of operations on them."""

    def __init__(self, runtime: Runtime, model: Model, *, writable: bool) -> None:
        self._runtime = runtime
        self.model = model
        self.writable = writable

    def check_leased(self, action: str) -> None:
        """Raise StaleView if no lease holds the model."""
        if not self.model.leased and not self.model.lease_epoch:
            name = self.model.name
            raise StaleView(
                f"{name!r} is not leased: {action} under `with runtime.lease({name!r})`"
            )

    def check_writable(self, method: str) -> None:
        """Raise TypeError if the weights are read-only, StaleView if they are not leased."""
        if not self.writable:
            raise TypeError(
                f"the weights of {self.model.name!r} are read-only, and {method} would change "
                "them: pass writable=True to load(), or work on a copy.deepcopy() of the module"
            )
        self.check_leased("change its weights")

    def refuse(self, action: str, instead: str = "") -> TypeError:
        """Return the error for an action that would take weights out of the arena.

        ``instead`` names an alternative besides a copy, and ends in ", or ".
        """
        return TypeError(
            f"{action} would take the weights of {self.model.name!r} out of the arena: "
            f"{instead}work on a copy.deepcopy() of the module"
        )

    @contextmanager
    def reading(self, action: str) -> Iterator[None]:
        """Keep the weights resident inside ``with``. Raises StaleView if no lease holds them."""
        self.check_leased(action)
        with self._runtime.lease(self.model):
            yield


class InArena:
    """The methods that parameters and other tensors in the arena share."""

    home: Home

    def _plain(self) -> torch.Tensor:
        """Return a copy that is an ordinary tensor."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with self.home.reading("copy it"):
                memo[id(self)] = self._plain()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.deepcopy(self).__reduce_ex__(protocol)

    @property
    def data(self) -> torch.Tensor:
        return _view(_base("data").__get__(self), self.home)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        mine: Any = _base("data").__get__(self)
        if _place(mine) != _place(value):
            raise self.home.refuse("assigning to data")

    @property
    def requires_grad(self) -> bool:
        return bool(_base("requires_grad").__get__(self))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value and not self.home.writable:
            raise TypeError(
                f"the weights of {self.home.model.name!r} are read-only and take no gradient: "
                "pass writable=True to load(), or work on a copy.deepcopy() of the module"
            )
        _base("requires_grad").__set__(self, value)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        self.requires_grad = requires_grad
        return self

    def detach(self) -> torch.Tensor:
        return _view(_base("detach")(self), self.home)

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = _base("__getitem__")(self, index)
        # An index of integers or booleans makes an ordinary copy.
        shared = part.untyped_storage().data_ptr() == _storage(self)
        return _view(part, self.home) if shared else part


def _base(name: str) -> Any:
    return getattr(torch.Tensor, name)


def _storage(tensor: Any) -> int:
    address: int = _base("untyped_storage")(tensor).data_ptr()
    return address


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _checked(name: str) -> Callable[..., Any]:
    change = _base(name)

    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        self.home.check_writable(name if name.startswith("__") else f"{name}()")
        return change(self, *arguments, **options)

    method.__name__ = name
    return method


def _in_place(name: str) -> bool:
    """Return whether a method of tensors changes the tensor that it is called on."""
    operator = name.startswith("__i") and hasattr(torch.Tensor, f"__{name[3:]}")
    ends = name.endswith("_") and not name.startswith("_")
    return name == "__setitem__" or operator or (ends and name != "requires_grad_")


for _name in filter(_in_place, dir(torch.Tensor)):
    setattr(InArena, _name, _checked(_name))


class ArenaTensor(InArena, torch.Tensor):
    """A buffer, or a view of a weight."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _plain(self) -> torch.Tensor:
        return self.clone()


class ArenaParameter(InArena, nn.Parameter):
    """A weight."""

    def _plain(self) -> torch.Tensor:
        return nn.Parameter(_base("detach")(self).clone(), self.requires_grad)


def _view(tensor: torch.Tensor, home: Home) -> torch.Tensor:
    made: Any = torch.Tensor._make_subclass(ArenaTensor, tensor)
    made.home = home
    return made  # type: ignore[no-any-return]


def in_arena(tensor: torch.Tensor, home: Home, *, parameter: bool) -> torch.Tensor:
    """Return the tensor's memory as a parameter or tensor that refuses what ``home`` refuses."""
    made: Any = torch.Tensor._make_subclass(ArenaParameter if parameter else ArenaTensor, tensor)
    made.home = home
    return made  # type: ignore[no-any-return]
