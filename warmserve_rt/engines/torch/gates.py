"""Gates: a torch module whose weights are a model's computes under leases alone, layer by layer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from warmserve_rt._errors import StaleView
from warmserve_rt.core.streams import native_stream

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from warmserve_rt import _native
    from warmserve_rt.core.runtime import Model, Runtime


def guard(
    module: nn.Module, runtime: Runtime, model: Model, entries: Iterable[nn.Module] = ()
) -> None:
    """Lets a module that is bound to a model's tensors run under leases alone.

    A forward pass raises StaleView if no lease holds the model when it begins. The pass then holds
    what the leases hold until it ends, also if they end before: an eviction waits for it, and only
    the next pass raises StaleView. Under a lease that streams, or that is on some layers, each part
    of the module waits for the layer that it computes with: on the host the thread does, on CUDA
    torch's current stream. It raises StaleView for a layer whose lease ended before it arrived.

    On CUDA a pass is also recorded: the weights are not unmapped before the device has done what
    the pass enqueued. ``entries``: parts of the module that may be called by themselves, as the
    whole may (an encoder); others may not.
    """
    gates = Gates(module, runtime, model)
    for entry in dict.fromkeys((module, *entries)):
        # Not by hooks: torch skips those after a pass that a KeyboardInterrupt has ended.
        entry.forward = gates.guarded(entry)


class Gates:
    """Hooks before the parts of a module, each waiting for the layers with which its part computes.

    Calling a hook costs more than what it asks. A hook is therefore removed once its layers have
    arrived, and is installed again when the leases on the model have changed, because a layer that
    stays under one lease may be evicted after another.
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
        self._lock = threading.Lock()  # over all below
        self._hooks: dict[nn.Module, RemovableHandle] = {}
        self._epoch = 0  # of the leases under which the hooks that are missing are not needed
        self._gated: dict[int, int] = {}  # passes that need gates, of each thread

    def guarded(self, entry: nn.Module) -> Callable[..., Any]:
        """The entry's forward as a pass."""
        forward = entry.forward
        layers = self._take(entry)

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            held = self._begin_pass()
            try:
                if held.complete:
                    if self._hooks:
                        self._remove_hooks()
                    return forward(*args, **kwargs)
                with self._gated_pass(held.lease_epoch):
                    self._wait(held, layers)
                    return forward(*args, **kwargs)
            finally:
                try:
                    if self.on_cuda:  # also if the pass fails: what it enqueued runs all the same
                        self._record(held)
                finally:
                    held.release()

        return run

    def _begin_pass(self) -> _native.Pass:
        held = self._model.native.begin_pass()
        if held is None:
            raise StaleView(self._runtime.why_not_leased(self._model))
        return held

    def _take(self, part: nn.Module) -> list[int]:
        """The layers that a part waits for when it is called by itself. It has no gate any more."""
        waits_for = self._layers.pop(part, [])
        within = set[int]().union(*(self._own[each] for each in part.modules()))
        return list(within) if len(within) == 1 else waits_for

    @contextmanager
    def _gated_pass(self, epoch: int) -> Iterator[None]:
        """Installs the hooks that are missing, and keeps them if another thread computes too: what
        its pass holds may be less, or more."""
        thread = threading.get_ident()
        with self._lock:
            self._gated[thread] = self._gated.get(thread, 0) + 1
            if epoch != self._epoch:
                for part in self._layers.keys() - self._hooks.keys():
                    self._hooks[part] = part.register_forward_pre_hook(self._gate)
                self._epoch = epoch
        try:
            yield
        finally:
            with self._lock:
                self._gated[thread] -= 1
                if not self._gated[thread]:
                    del self._gated[thread]

    def _remove_hooks(self) -> None:
        with self._lock:
            if self._gated:
                return
            while self._hooks:
                self._hooks.popitem()[1].remove()
            self._epoch = 0

    def _gate(self, part: nn.Module, arguments: Any) -> None:
        held = self._begin_pass()  # the thread's pass again
        try:
            there = self._wait(held, self._layers[part])
        finally:
            held.release()
        with self._lock:
            alone = self._gated.keys() <= {threading.get_ident()}
            if there and alone and (hook := self._hooks.pop(part, None)):
                hook.remove()

    def _wait(self, held: _native.Pass, layers: list[int]) -> bool:
        """Whether the layers are resident; else torch's current stream waits for them."""
        stream = self._stream() if self.on_cuda else None
        there = True
        for layer in layers:
            there &= held.wait(layer, stream)
        return there

    def _record(self, held: _native.Pass) -> None:
        """Keeps the weights until torch's current stream has done what it was given. A capture
        computes nothing: its replays do, and their caller records them."""
        if not torch.cuda.is_current_stream_capturing():
            held.record(self._stream())

    def _stream(self) -> _native.Stream:
        """Of the arena's device, which need not be the current one."""
        return native_stream(self._runtime.native, torch.cuda.current_stream(self._device))


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
