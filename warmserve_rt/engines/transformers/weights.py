"""Weights in an arena: parameters and buffers that refuse to be overwritten, moved or converted.

torch has many such operations, but they pass through few functions. In-place methods, ``data``,
``requires_grad``, copying and pickling belong to the tensor, so a tensor class checks them.
Conversions go through ``Module._apply`` and state through ``Module._load_from_state_dict``, so each
part of a bound module overrides these two. No operation of a forward pass is slower.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from warmserve_rt._errors import StaleView

from .moe import Experts

if TYPE_CHECKING:
    from warmserve_rt.core.runtime import Model, Runtime

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_GATES = "warmserve_rt.engines.torch.gates"


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


class _InArena:
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
    setattr(_InArena, _name, _checked(_name))


class ArenaTensor(_InArena, torch.Tensor):
    """A buffer, or a view of a weight."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _plain(self) -> torch.Tensor:
        return self.clone()


class ArenaParameter(_InArena, nn.Parameter):
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


def protect(module: nn.Module, home: Home, names: Mapping[str, str]) -> None:
    """Make each part of a module refuse operations that would move its weights out of the arena.

    Parameters
    ----------
    module : nn.Module
        A module whose weights are in the arena; it is changed in place.
    home : Home
        The model and its rules.
    names : mapping of name to name
        The checkpoint's name of each parameter or buffer that the checkpoint has.

    Notes
    -----
    A deep or pickled copy is an ordinary module with memory of its own and without gates. Making a
    copy reads the weights, and so does `save_pretrained`; both raise StaleView without a lease.
    """
    for part in module.modules():
        own = vars(part)
        own["_apply"] = partial(_apply, part, home)
        own["_load_from_state_dict"] = partial(_load_from_state_dict, part, home)
        own["__deepcopy__"] = partial(_deepcopy, part, home)
        own["__reduce_ex__"] = partial(_reduce, part)
        if isinstance(part, PreTrainedModel):
            own["save_pretrained"] = partial(
                _save_pretrained, part, home, names if part is module else None
            )
            own["resize_token_embeddings"] = partial(_resize_token_embeddings, part, home)
            own["tie_weights"] = _tie_weights


_OVERRIDDEN = {
    "forward",
    "_apply",
    "_load_from_state_dict",
    "__deepcopy__",
    "__reduce_ex__",
    "save_pretrained",
    "resize_token_embeddings",
    "tie_weights",
    "warmserve_model",
}


def _apply(part: Any, home: Home, change: Callable[[Any], Any], recurse: bool = True) -> Any:
    """Convert the tensors outside the arena. Refuses a conversion that would change the weights."""
    tensors: tuple[Any, ...] = (*part.parameters(recurse), *part.buffers(recurse))
    for tensor in tensors:
        if not isinstance(tensor, ArenaTensor | ArenaParameter):
            continue
        # We try the conversion on a tensor without elements, so no weight is read.
        probe: Any = torch.empty((0,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)
        shared = probe.is_shared()
        if change(probe) is not probe or probe.is_shared() != shared:
            raise home.refuse("converting or moving", "pass dtype to load(), or ")
    return type(part)._apply(
        part, lambda tensor: tensor if isinstance(tensor, _InArena) else change(tensor), recurse
    )


def _load_from_state_dict(
    part: Any, home: Home, state: Any, prefix: str, metadata: Any, *arguments: Any
) -> None:
    own = (*part._parameters.items(), *part._buffers.items())
    if any(isinstance(each, _InArena) and prefix + name in state for name, each in own):
        home.check_writable("load_state_dict()")
        if metadata.get("assign_to_params_buffers"):
            raise home.refuse("load_state_dict(assign=True)", "leave out assign, or ")
    type(part)._load_from_state_dict(part, state, prefix, metadata, *arguments)


def _deepcopy(part: Any, home: Home, memo: dict[int, Any]) -> Any:
    with home.reading("copy it"):
        made = object.__new__(type(part))
        memo[id(part)] = made
        state = {key: value for key, value in vars(part).items() if key not in _OVERRIDDEN}
        for kind in _HOOKS:
            hooks = state[kind].items()
            kept = {key: hook for key, hook in hooks if getattr(hook, "__module__", None) != _GATES}
            state[kind] = type(state[kind])(kept)
        for flags in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            known = state["_forward_hooks"].keys()
            state[flags] = type(state[flags])((k, v) for k, v in state[flags].items() if k in known)
        made.__setstate__(copy.deepcopy(state, memo))
    return made


def _reduce(part: Any, protocol: Any) -> Any:
    return copy.deepcopy(part).__reduce_ex__(protocol)


def _save_pretrained(
    part: Any, home: Home, names: Mapping[str, str] | None, *arguments: Any, **options: Any
) -> Any:
    if any(isinstance(each, Experts) for each in part.modules()):
        # For unstacked experts transformers accepts only the names of the checkpoint, and we know
        # those of the whole module only.
        if names is None:
            raise TypeError(
                "a part with unstacked experts cannot be saved alone: save the module instead"
            )
        state = part.state_dict().items()
        found = {names[target]: tensor for target, tensor in state if target in names}
        options = {"state_dict": found, **options, "save_original_format": False}
    with home.reading("save it"):
        return type(part).save_pretrained(part, *arguments, **options)


def _resize_token_embeddings(
    part: Any, home: Home, new_num_tokens: int | None = None, *arguments: Any, **options: Any
) -> Any:
    embeddings = part.get_input_embeddings()
    if new_num_tokens in (None, embeddings.weight.shape[0]):
        return embeddings
    raise home.refuse("resize_token_embeddings()")


def _tie_weights(*arguments: Any, **options: Any) -> None:
    """Do nothing: binding has tied the weights as the checkpoint has them."""
