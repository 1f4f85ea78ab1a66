"""Gates: a torch module whose weights are a model's waits for each layer as it comes to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from warmserve_rt._errors import StaleView
from warmserve_rt.streams import native_stream

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from warmserve_rt.runtime import Model, Runtime


def guard(
    module: nn.Module, runtime: Runtime, model: Model, entries: Iterable[nn.Module] = ()
) -> None:
    """Lets a module that is bound to a model's tensors run under leases alone.

    A forward pass raises StaleView while no lease holds the model. Under one that streams, or is on
    some layers, each part of the module waits for the layer it computes with: on the host the
    thread does, on CUDA torch's current stream. ``entries``: parts of it that may be called by
    themselves, as a whole may (an encoder); other parts are not to be.
    """
    gates = Gates(module, runtime, model)

    def must_be_leased(layers: list[int]) -> Any:
        def check(part: nn.Module, arguments: Any) -> None:
            all_there, leased = model.native.leased
            if all_there:
                gates.remove()
            elif leased:
                gates.install()
                gates.wait(layers)
            else:
                raise StaleView(
                    f"{model.name!r} is not leased: run it under `with runtime.lease"
                    f"({model.name!r})`"
                )

        return check

    for entry in dict.fromkeys((module, *entries)):
        # A hook of an entry that is made while one of its hooks runs would come too late.
        entry.register_forward_pre_hook(must_be_leased(gates.take(entry)))


class Gates:
    """Hooks before the parts of a module, each waiting for the layers with which its part computes.

    They are there only while something may be missing: a hook costs more than what it asks.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, model: Model) -> None:
        self._runtime = runtime
        self._model = model
        tensors = model.tensors()
        self._on_cuda = any(tensor.is_cuda for tensor in tensors.values())
        self._layer_at = {
            tensors[name].data_ptr(): spec.layer
            for name, spec in model.layout.tensors.items()
            if spec.nbytes
        }
        self._layers = gated_parts(module, self._layer_at)
        self._hooks: list[RemovableHandle] = []

    def take(self, part: nn.Module) -> list[int]:
        """The layers that a part waits for where it is called by itself; from now on that is the
        caller's business."""
        waits_for = self._layers.pop(part, [])
        within = set[int]().union(*(_own_layers(each, self._layer_at) for each in part.modules()))
        return list(within) if len(within) == 1 else waits_for

    def install(self) -> None:
        if not self._hooks:
            self._hooks = [
                part.register_forward_pre_hook(self._gate(layers))
                for part, layers in self._layers.items()
            ]

    def remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def wait(self, layers: list[int]) -> None:
        stream = None
        if self._on_cuda:
            stream = native_stream(self._runtime.native, torch.cuda.current_stream())
        for layer in layers:
            self._model.native.wait(layer, stream)

    def _gate(self, layers: list[int]) -> Any:
        return lambda module, arguments: self.wait(layers)


def gated_parts(module: nn.Module, layer_at: dict[int, int]) -> dict[nn.Module, list[int]]:
    """For each part that has to wait, the layers that it waits for, ascending.

    ``layer_at``: from a tensor's address to its layer. A part is as large as it can be with the
    tensors of one layer; what has several waits for those of its own tensors, and its parts for
    theirs. A container that is never called leaves it to its parts, or to whoever has it.
    """
    within: dict[nn.Module, set[int]] = {}
    found: dict[nn.Module, set[int]] = {}

    def gather(part: nn.Module) -> set[int]:
        if part not in within:
            within[part] = _own_layers(part, layer_at).union(*map(gather, part.children()))
        return within[part]

    def descend(part: nn.Module, caller: nn.Module) -> None:
        called = type(part).forward is not nn.Module.forward
        if called and len(within[part]) <= 1:
            found.setdefault(part, set()).update(within[part])
            return
        caller = part if called else caller
        found.setdefault(caller, set()).update(_own_layers(part, layer_at))
        for child in part.children():
            descend(child, caller)

    gather(module)
    descend(module, module)
    return {part: sorted(layers) for part, layers in found.items() if layers}


def _own_layers(part: nn.Module, layer_at: dict[int, int]) -> set[int]:
    """Those of the tensors that are the part's and not a part's of it."""
    own = (*part._parameters.values(), *part._buffers.values())
    addresses = (tensor.data_ptr() for tensor in own if tensor is not None)
    return {layer_at[address] for address in addresses if address in layer_at}
