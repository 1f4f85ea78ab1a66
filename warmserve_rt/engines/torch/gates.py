"""Gates: forward passes of a bound torch module need a lease and wait layer by layer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from warmserve_rt._errors import StaleView
from warmserve_rt.core.framework_streams import is_captured

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from warmserve_rt import _native
    from warmserve_rt.core.model import Model
    from warmserve_rt.core.runtime import Runtime


def guard(
    module: nn.Module, runtime: Runtime, model: Model, entries: Iterable[nn.Module] = ()
) -> None:
    """Make a module that is bound to a model's tensors run under leases only.

    Parameters
    ----------
    module : nn.Module
        A module whose parameters and buffers are views of the model's tensors.
    runtime, model
        The runtime, and the model of the runtime that the module is bound to.
    entries : iterable of nn.Module
        Parts of the module that may be called directly (an encoder). The module itself always may;
        no other part may.

    Notes
    -----
    A forward pass raises StaleView if no lease holds the model when the pass begins. The pass then
    holds the leased layers until it ends, even if the leases end earlier: an eviction waits for the
    pass, and only the next pass raises StaleView.

    Under a streaming lease, or a lease on some layers, each part of the module waits for the layers
    that it computes with. On the host the thread waits; on CUDA torch's current stream waits, or
    the thread if that stream is being captured. The part raises StaleView for a layer whose lease
    ended before the layer arrived.

    On CUDA a pass is also recorded, even if its leases have ended: the weights stay mapped until
    the device has finished the work that the pass enqueued. A captured pass enqueues none.
    """
    gates = Gates(module, runtime, model)
    for entry in dict.fromkeys((module, *entries)):
        # We wrap forward() because torch skips the hooks after a pass that KeyboardInterrupt ended.
        entry.forward = gates.guarded(entry)


class Gates:
    """Pre-forward hooks that make each part of a module wait for the layers it computes with.

    Calling a hook costs more than the check inside it. A hook is therefore removed once its layers
    have arrived. It is installed again when the leases on the model have changed, because a layer
    that stays resident under one lease may be evicted after another.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, model: Model) -> None:
        self._runtime = runtime
        self._model = model
        tensors = model.tensors("torch")
        self._device = next((t.device for t in tensors.values()), torch.device("cpu"))
        self.on_cuda = self._device.type == "cuda"
        self._own = own_layers(module, model)
        self._layers = gated_parts(module, self._own)
        self._lock = threading.Lock()  # protects the fields below
        self._hooks: dict[nn.Module, RemovableHandle] = {}
        self._epoch = 0  # the lease epoch under which the removed hooks are not needed
        self._gated: dict[int, int] = {}  # thread -> its passes that need hooks

    def guarded(self, entry: nn.Module) -> Callable[..., Any]:
        """Return the entry's forward, wrapped so that each call is one pass."""
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
                    if self.on_cuda:  # also after a failure: the device runs the enqueued work
                        self._record(held)
                finally:
                    held.release()

        return run

    def _begin_pass(self) -> _native.Pass:
        held = self._model.begin_pass()
        if held is None:
            raise StaleView(self._runtime.why_not_leased(self._model))
        return held

    def _take(self, part: nn.Module) -> list[int]:
        """Remove a part's gate; return the layers that the part waits for when called directly."""
        waits_for = self._layers.pop(part, [])
        within = set[int]().union(*(self._own[each] for each in part.modules()))
        return list(within) if len(within) == 1 else waits_for

    @contextmanager
    def _gated_pass(self, epoch: int) -> Iterator[None]:
        """Install the missing hooks if the leases have changed, and count the thread's gated pass.

        No hook is removed while another thread also has a gated pass, because that pass may hold
        other layers than this one.
        """
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
        held = self._begin_pass()  # joins the pass that this thread has begun
        try:
            there = self._wait(held, self._layers[part])
        finally:
            held.release()
        with self._lock:
            alone = self._gated.keys() <= {threading.get_ident()}
            if there and alone and (hook := self._hooks.pop(part, None)):
                hook.remove()

    def _wait(self, held: _native.Pass, layers: list[int]) -> bool:
        """Wait for the layers. Return False if some are not resident yet and torch's current
        stream waits for them instead of the thread.

        A stream that is being captured cannot wait, because the graph would, too.
        """
        stream = self._uncaptured_stream() if self.on_cuda else None
        there = True
        for layer in layers:
            there &= held.wait(layer, stream)
        return there

    def _record(self, held: _native.Pass) -> None:
        """Keep the weights mapped until torch's current stream has finished its enqueued work.

        A stream capture computes nothing and is skipped; the caller of its replays records them.
        """
        if stream := self._uncaptured_stream():
            held.record(stream)

    def _uncaptured_stream(self) -> _native.Stream | None:
        """Return torch's current stream of the arena's device, which may differ from torch's
        current device. None if it is being captured."""
        stream = torch.cuda.current_stream(self._device)
        return None if is_captured(stream) else self._runtime.adopt_stream(stream)


def gated_parts(module: nn.Module, own: Mapping[nn.Module, set[int]]) -> dict[nn.Module, list[int]]:
    """Return the parts that have to wait, each with the layers that it waits for, ascending.

    Parameters
    ----------
    module : nn.Module
        The module to divide.
    own : mapping of part to layers
        The layers of each part's own tensors, without the tensors of its children.

    Notes
    -----
    The result has the largest parts whose tensors all belong to one layer. A part with tensors of
    several layers waits for the layers of its own tensors, and its children wait for theirs. A
    container without a forward() of its own, such as nn.ModuleList, is never called: its children
    wait for their layers, and the nearest caller above it waits for the layers of its own tensors.
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


def own_layers(module: nn.Module, model: Model) -> dict[nn.Module, set[int]]:
    """Return, for each part of a bound module, the layers of its own tensors, not of its parts'."""
    tensors = model.tensors("torch")
    layer_at = {
        tensors[name].data_ptr(): spec.layer
        for name, spec in model.layout.tensors.items()
        if spec.nbytes
    }

    def own(part: nn.Module) -> set[int]:
        held = (*part._parameters.values(), *part._buffers.values())
        addresses = (tensor.data_ptr() for tensor in held if tensor is not None)
        return {layer_at[address] for address in addresses if address in layer_at}

    return {part: own(part) for part in module.modules()}
