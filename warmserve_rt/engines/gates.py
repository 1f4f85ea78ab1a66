"""Gates: a torch module whose weights are a model's waits for each layer as it comes to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from warmserve_rt._errors import StaleView
from warmserve_rt.streams import native_stream

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from warmserve_rt import _native
    from warmserve_rt.runtime import Model, Runtime


def guard(
    module: nn.Module, runtime: Runtime, model: Model, entries: Iterable[nn.Module] = ()
) -> None:
    """Lets a module that is bound to a model's tensors run under leases alone.

    A forward pass raises StaleView while no lease holds the model. Under one that streams, or is on
    some layers, each part of the module waits for the layer it computes with: on the host the
    thread does, on CUDA torch's current stream. There a pass is recorded too: what it has enqueued
    will run before the weights are unmapped, though the lease end before it. ``entries``: parts of
    it that may be called by themselves, as a whole may (an encoder); other parts are not to be.
    """
    gates = Gates(module, runtime, model)

    def must_be_leased(layers: list[int]) -> Any:
        def check(part: nn.Module, arguments: Any) -> None:
            all_there, epoch = model.native.leased
            if all_there:
                gates.remove()
            elif epoch:
                gates.install(epoch)
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
        if gates.on_cuda:  # also where a pass fails: what it enqueued runs all the same
            entry.register_forward_hook(lambda *_: gates.record(), always_call=True)


class Gates:
    """Hooks before the parts of a module, each waiting for the layers with which its part computes.

    A hook costs more than what it asks. So each is there only until its layers are, and comes back
    when the leases on the model have changed, for what is there for one may go after another.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, model: Model) -> None:
        self._runtime = runtime
        self._model = model
        tensors = model.tensors("torch")
        self._device = next((t.device for t in tensors.values()), torch.device("cpu"))
        self.on_cuda = self._device.type == "cuda"
        layer_at = {
            tensors[name].data_ptr(): spec.layer
            for name, spec in model.layout.tensors.items()
            if spec.nbytes
        }
        self._own = {part: _own_layers(part, layer_at) for part in module.modules()}
        self._layers = gated_parts(module, self._own)
        self._hooks: dict[nn.Module, RemovableHandle] = {}
        self._epoch = 0  # of the leases for which hooks that are not there are not needed

    def take(self, part: nn.Module) -> list[int]:
        """The layers that a part waits for where it is called by itself; from now on that is the
        caller's business."""
        waits_for = self._layers.pop(part, [])
        within = set[int]().union(*(self._own[each] for each in part.modules()))
        return list(within) if len(within) == 1 else waits_for

    def install(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        for part in self._layers.keys() - self._hooks.keys():
            self._hooks[part] = part.register_forward_pre_hook(self._gate)
        self._epoch = epoch

    def remove(self) -> None:
        while self._hooks:
            self._hooks.popitem()[1].remove()
        self._epoch = 0

    def wait(self, layers: list[int]) -> bool:
        """Whether they are resident; else torch's current stream waits for them."""
        stream = self._stream() if self.on_cuda else None
        there = True
        for layer in layers:
            there &= self._model.native.wait(layer, stream)
        return there

    def record(self) -> None:
        """What torch's current stream was given uses the model, if it runs at all: of a capture
        the replays do, and whoever launches those records them."""
        if torch.cuda.is_current_stream_capturing():
            return
        with suppress(StaleView):  # the lease has ended: there it was recorded, or nowhere
            self._model.native.record(self._stream())

    def _stream(self) -> _native.Stream:
        """Of the arena's device, which need not be the current one."""
        return native_stream(self._runtime.native, torch.cuda.current_stream(self._device))

    def _gate(self, part: nn.Module, arguments: Any) -> None:
        if self.wait(self._layers[part]) and (hook := self._hooks.pop(part, None)):
            hook.remove()


def gated_parts(module: nn.Module, own: Mapping[nn.Module, set[int]]) -> dict[nn.Module, list[int]]:
    """For each part that has to wait, the layers that it waits for, ascending.

    ``own``: of each part, the layers of those tensors that are not a part's of it. A part is as
    large as it can be with the tensors of one layer; what has several waits for those of its own
    tensors, and its parts for theirs. A container that is never called leaves it to its parts, or
    to whoever has it.
    """
    within: dict[nn.Module, set[int]] = {}
    found: dict[nn.Module, set[int]] = {}

    def gather(part: nn.Module) -> set[int]:
        if part not in within:
            within[part] = own[part].union(*map(gather, part.children()))
        return within[part]

    def descend(part: nn.Module, caller: nn.Module) -> None:
        called = type(part).forward is not nn.Module.forward
        if called and len(within[part]) <= 1:
            found.setdefault(part, set()).update(within[part])
            return
        caller = part if called else caller
        found.setdefault(caller, set()).update(own[part])
        for child in part.children():
            descend(child, caller)

    gather(module)
    descend(module, module)
    return {part: sorted(layers) for part, layers in found.items() if layers}


def _own_layers(part: nn.Module, layer_at: Mapping[int, int]) -> set[int]:
    own = (*part._parameters.values(), *part._buffers.values())
    addresses = (tensor.data_ptr() for tensor in own if tensor is not None)
    return {layer_at[address] for address in addresses if address in layer_at}
