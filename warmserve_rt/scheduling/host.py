"""Show the host cache of a runtime to a scheduler as a host tier, and fill it as planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from warmserve_rt._errors import Busy
from warmserve_rt.core.loading import BACKGROUND
from warmserve_rt.policy._arrays import F64

from .device import RuntimeDevice
from .model_on_device import ModelOnDevice


class RuntimeHost:
    """Implement :class:`~.protocols.HostTier` for the host cache of one runtime.

    A layer that is on the device, or that the plan loads there, is not loaded to the cache. It may
    leave the cache before the layers that are only there.

    Parameters
    ----------
    device
        The device of the runtime.
    file_bandwidth
        Bytes per second that the device loads of layers outside the cache.

    Notes
    -----
    Not thread-safe.
    """

    def __init__(self, device: RuntimeDevice, file_bandwidth: float) -> None:
        self._device, self.file_bandwidth = device, file_bandwidth
        self.devices: Sequence[int] = (device.index,)

    @property
    def nbytes(self) -> float:
        """Return the bytes that the cache may hold: its budget, or those pinned if pinning has
        failed."""
        cache = self._device.seen.host_cache
        return float(cache.pinned_bytes if cache.error else cache.budget_bytes)

    def holds(self, model: int) -> Sequence[bool]:
        on_device = self._device.models[model]
        state = on_device.state(self._device.seen)
        if state is None:
            return [False] * len(on_device.ends)
        return [layer.cached for layer in state.layers]

    def hold(self, plan: Mapping[int, F64]) -> None:
        values = {model: worth.tolist() for model, worth in plan.items() if worth.any()}
        self._device.set_host_values(values)
        for model, on_device in enumerate(self._device.models):
            if model not in values:
                on_device.cancel_host([])
        for model in sorted(values, key=lambda each: -max(values[each])):
            self._load(self._device.models[model])

    def _load(self, on_device: ModelOnDevice) -> None:
        """Load the missing layers of a model that are wanted in the cache, in the background."""
        device, registered = self._device, on_device.registered
        state = on_device.state(device.seen)
        wanted = [
            i
            for i, layer in enumerate(state.layers if state else ())
            if on_device.for_host(i, layer)
        ]
        coming = on_device.cancel_host(wanted)
        missing = [i for i in wanted if state and not state.layers[i].cached and i not in coming]
        if not missing or registered is None or device.lost or device.now < on_device.host_refused:
            return
        try:
            ticket = device.runtime.prewarm(
                registered, layers=missing, priority=BACKGROUND, to="host"
            )
        except Busy:
            return
        except Exception as error:
            if registered in device.runtime.models:  # else it was unregistered meanwhile
                device.refuse_host(on_device, error)
            return
        on_device.host_tickets.append((ticket, missing))
