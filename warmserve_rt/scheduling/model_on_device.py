"""Follow one model of a fleet on one device: what is registered, resident and being loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate

from warmserve_rt._errors import Busy, Cancelled, OutOfDeviceMemory, WarmServeError
from warmserve_rt.core.model import Model
from warmserve_rt.core.runtime import Runtime
from warmserve_rt.core.snapshot import Snapshot
from warmserve_rt.core.ticket import Ticket
from warmserve_rt.policy.profile import ModelProfile

from .registered_models import find_model


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
    tickets
        The tickets of loads in progress, each with the number of leading layers that it loads.
    keep
        The keep values that the layers were given last, or None.
    refused
        Time until which the model is not loaded.
    missing
        The last reported reason why no model was found; empty if the model was found.
    """

    __slots__ = ("ends", "keep", "missing", "profile", "rank", "refused", "registered", "tickets")

    def __init__(self, profile: ModelProfile, rank: int | None) -> None:
        self.profile, self.rank = profile, rank
        self.ends = list(accumulate(profile.layer_bytes))
        self.registered: Model | None = None
        self.tickets: list[tuple[Ticket, int]] = []
        self.keep: list[float] | None = None
        self.refused, self.missing = -math.inf, ""

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
        if self.registered and self.keep:
            with suppress(ValueError, WarmServeError):  # unregistered, or the runtime is closed
                runtime.set_keep_value(self.registered, 0.0)
        self.registered, self.tickets, self.keep, self.refused = None, [], None, -math.inf

    def shard(self, seen: Snapshot) -> RuntimeShard | None:
        """Return the leading layers that the device holds or loads, or None if there are none."""
        state = seen.models.get(self.registered.name) if self.registered else None
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

    def drop_done(self) -> list[Exception]:
        """Drop the tickets that are done. Return the errors of loads that failed."""
        running: list[tuple[Ticket, int]] = []
        errors: list[Exception] = []
        for ticket, layers in self.tickets:
            if not ticket.done:
                running.append((ticket, layers))
                continue
            try:
                ticket.wait(0)
            except (Busy, Cancelled, OutOfDeviceMemory):
                pass  # a lease took the room, or the layers were evicted by another caller
            except Exception as error:
                errors.append(error)
        self.tickets = running
        return errors
