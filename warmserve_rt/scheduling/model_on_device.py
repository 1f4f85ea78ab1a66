"""Follow one model of a fleet on one device: what is registered, resident and being loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import accumulate
from typing import TypeVar

from warmserve_rt._errors import Busy, Cancelled, OutOfDeviceMemory, WarmServeError
from warmserve_rt.core.model import Model
from warmserve_rt.core.runtime import Runtime
from warmserve_rt.core.snapshot import LayerSnapshot, ModelSnapshot, Snapshot
from warmserve_rt.core.ticket import Ticket
from warmserve_rt.policy.profile import ModelProfile

from .registered_models import find_model

_T = TypeVar("_T")


class RuntimeShard:
    """Implement :class:`~.protocols.Shard`."""

    __slots__ = ("goal", "layers", "pinned")

    def __init__(self, layers: int, goal: int, *, pinned: bool) -> None:
        self.layers, self.goal, self.pinned = layers, goal, pinned


class ModelOnDevice:
    """The state of one model of a fleet on one device.

    Attributes
    ----------
    profile, rank
        The model's profile, and the rank of its shard on this device. The rank is None on devices
        that hold no shard of the model.
    ends
        Cumulative bytes at the end of each layer.
    registered
        The registered model that the profile's name stands for now, or None.
    tickets, host_tickets
        The tickets of loads in progress: to the device, each with the number of leading layers that
        it loads, and to the host cache, each with the layers that it loads.
    planned, device_values
        The number of leading layers that the device should hold, and the keep values of all layers
        on the device.
    host_values
        The value of each layer in the host cache, 0 if it should not be there. Empty if no layer
        should be there.
    keep
        The keep values that the layers were given last, or None.
    refused, host_refused
        Time until which the model is not loaded, to the device and to the host cache.
    missing
        The last reported reason why no model was found; empty if the model was found.
    """

    __slots__ = (
        "device_values",
        "ends",
        "host_refused",
        "host_tickets",
        "host_values",
        "keep",
        "missing",
        "planned",
        "profile",
        "rank",
        "refused",
        "registered",
        "tickets",
    )

    def __init__(self, profile: ModelProfile, rank: int | None) -> None:
        self.profile, self.rank = profile, rank
        self.ends = list(accumulate(profile.layer_bytes))
        self.registered: Model | None = None
        self.missing = ""
        self._forget()

    def _forget(self) -> None:
        """Begin without loads and values."""
        self.tickets: list[tuple[Ticket, int]] = []
        self.host_tickets: list[tuple[Ticket, list[int]]] = []
        self.planned, self.device_values = 0, [0.0] * len(self.ends)
        self.host_values: list[float] = []
        self.keep: list[float] | None = None
        self.refused = self.host_refused = -math.inf

    def follow(self, runtime: Runtime, device: int, failed: Callable[[Exception], None]) -> None:
        """Find the model that the profile's name stands for now.

        Parameters
        ----------
        runtime
            The runtime of the device.
        device
            The index of the device, for messages.
        failed
            Called with the reason if the model is missing, once until it has been found again.
        """
        if self.rank is None:
            return
        try:
            found = find_model(runtime, device, self.profile)
            self.missing = ""
        except ValueError as error:
            found = None
            if self.missing != str(error):
                self.missing = str(error)
                failed(error)
        if found is not self.registered:
            self.let_go(runtime)
            self.registered = found

    def let_go(self, runtime: Runtime) -> None:
        """Cancel the loads of the registered model, and let its layers be evicted first."""
        self.cancel(0)
        self.cancel_host([])
        if self.registered and self.keep:
            with suppress(ValueError, WarmServeError):  # unregistered, or the runtime is closed
                runtime.set_keep_value(self.registered, 0.0)
        self.registered = None
        self._forget()

    def state(self, seen: Snapshot) -> ModelSnapshot | None:
        """Return the state of the registered model, or None."""
        return seen.models.get(self.registered.name) if self.registered else None

    def shard(self, seen: Snapshot) -> RuntimeShard | None:
        """Return the leading layers that the device holds or loads, or None if there are none."""
        state = self.state(seen)
        if state is None:
            return None
        layers = goal = 0
        coming = max((brings for _, brings in self.tickets), default=0)
        for layer in state.layers:
            here = layer.residency == "resident"
            if not (here or layer.residency == "filling" or layer.leases or goal < coming):
                break
            layers += here and layers == goal
            goal += 1
        return RuntimeShard(layers, goal, pinned=state.leases > 0) if goal else None

    def cancel(self, layers: int) -> int:
        """Cancel the loads that reach beyond these leading layers. Return the number of leading
        layers that the other loads bring."""
        kept = []
        for ticket, brings in self.tickets:
            if brings > layers:
                ticket.cancel()
            else:
                kept.append((ticket, brings))
        self.tickets = kept
        return max((brings for _, brings in kept), default=0)

    def cancel_host(self, layers: Iterable[int]) -> set[int]:
        """Cancel the loads to the host cache that bring other layers than these. Return the layers
        that the other loads bring."""
        wanted, kept = set(layers), []
        for ticket, brings in self.host_tickets:
            if wanted.issuperset(brings):
                kept.append((ticket, brings))
            else:
                ticket.cancel()
        self.host_tickets = kept
        return {layer for _, brings in kept for layer in brings}

    def for_host(self, layer: int, state: LayerSnapshot) -> bool:
        """Return whether a layer should be in the host cache and is not on the device."""
        away = state.residency == "absent" and not state.leases and layer >= self.planned
        return away and bool(self.host_values) and self.host_values[layer] > 0

    def values(self, seen: Snapshot, above: float) -> list[float]:
        """Return the keep values of all layers.

        A layer has one value for both tiers. A layer that is on the device, or is planned there,
        has its value there. A layer that only the host cache should hold has a value of more than
        ``above``: all others leave the cache before it.

        Parameters
        ----------
        seen
            A snapshot of the runtime.
        above
            The highest value of any layer on the device.
        """
        state = self.state(seen)
        if state is None or not self.host_values:
            return self.device_values
        return [
            above + self.host_values[i] if self.for_host(i, layer) else self.device_values[i]
            for i, layer in enumerate(state.layers)
        ]

    def drop_done(self) -> tuple[list[Exception], list[Exception]]:
        """Drop the tickets that are done. Return the errors of loads that failed, to the device and
        to the host cache."""
        self.tickets, errors = _running(self.tickets)
        self.host_tickets, host_errors = _running(self.host_tickets)
        return errors, host_errors


def _running(tickets: list[tuple[Ticket, _T]]) -> tuple[list[tuple[Ticket, _T]], list[Exception]]:
    """Return the tickets that are not done, and the errors of those that failed."""
    running: list[tuple[Ticket, _T]] = []
    errors: list[Exception] = []
    for ticket, brings in tickets:
        if not ticket.done:
            running.append((ticket, brings))
            continue
        try:
            ticket.wait(0)
        except (Busy, Cancelled, OutOfDeviceMemory):
            pass  # a lease or other layers took the room, or another caller evicted the layers
        except Exception as error:
            errors.append(error)
    return running, errors
