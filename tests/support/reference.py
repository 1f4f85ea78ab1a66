"""A reference model of the runtime in plain Python, for a device that the CPU fills directly.

The native runtime must do the same, step for step, under ``pump``. The model has no memory and no
threads; sizes are in granules.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from reference_parts import (
    BUSY,
    CANCELLED,
    FOREGROUND,
    TOO_LARGE,
    Fill,
    Layer,
    Lease,
    Model,
    Refused,
    Ticket,
    granules,
)


class Reference:
    def __init__(self, capacity: int, background_share: float = 0.05) -> None:
        self.capacity = self.free = capacity
        self.background_share = background_share
        self.foreground_chunks = self.background_chunks = 0
        self.models: dict[str, Model] = {}
        self.fills: list[Fill] = []
        self.swapping: list[Ticket] = []
        self.line: list[Lease] = []
        self.admitted: list[Lease] = []
        self.clock = self.serial = 0

    # Operations.

    def register(self, name: str, layers: list[int]) -> None:
        self.serial += 1
        model = self.models[name] = Model(name, self.serial)
        model.layers = [Layer(model, i, granules) for i, granules in enumerate(layers)]

    def unregister(self, name: str) -> None:
        self.evict(name)
        del self.models[name]

    def prewarm(
        self,
        name: str,
        priority: int,
        layers: list[int] | None = None,
        evict_below: float = math.inf,
    ) -> Ticket:
        wanted = self.models[name].some(layers)
        self._require_room(wanted)
        ticket = Ticket(priority, wanted, evict_below=evict_below)
        if evict_below < math.inf:
            queued = [fill.layer for fill in self.fills if not fill.copying]
            new = [layer for layer in wanted if layer.state == "absent" and not layer.fill]
            short = granules(queued) + granules(new) - self.free
            if short > 0 and self._victims(short, [ticket], lambda layer: layer in wanted) is None:
                raise Refused(BUSY)
        return self._request(ticket)

    def swap(self, evict: str, load: str, priority: int) -> Ticket:
        old, wanted = self.models[evict], self.models[load].some(None)
        if old.leases:
            raise Refused(BUSY)
        self._require_room(wanted)
        self._drop_layers(old.layers)
        return self._request(Ticket(priority, wanted, swaps_out=old))

    def evict(self, name: str, layers: list[int] | None = None) -> None:
        chosen = self.models[name].some(layers)
        while True:
            if any(layer.leases for layer in chosen):
                raise Refused(BUSY)
            self._drop_layers(chosen)
            for layer in chosen:
                if layer.state == "resident":
                    self._evict_layer(layer)
            while any(layer.state == "filling" for layer in chosen):
                assert self.step()
            if all(layer.state == "absent" for layer in chosen):
                return

    def cancel(self, ticket: Ticket) -> None:
        if not ticket.done:
            self._drop(ticket, CANCELLED)

    def begin_lease(self, names: list[str], owner: int, layers: list[int] | None = None) -> Lease:
        lease = Lease([layer for name in names for layer in self.models[name].some(layers)], owner)
        if (not self.line and self._fits(lease)) or self._nested(lease):
            self._admit(lease)
            return lease
        if granules(lease.layers) > self.capacity:
            raise Refused(TOO_LARGE)
        self.line.append(lease)
        if self._stuck():
            self.line.remove(lease)
            raise Refused(BUSY)
        lease.in_line = True
        return lease

    def share(self, lease: Lease, owner: int) -> Lease:
        shared = Lease(lease.layers, owner)
        self._admit(shared)
        return shared

    def end_lease(self, lease: Lease) -> None:
        if lease.ticket and not lease.ticket.done:
            self._drop(lease.ticket, CANCELLED)
        if lease.in_line:
            self.line.remove(lease)
            lease.in_line = False
        elif lease.admitted:
            lease.admitted = False
            self.admitted.remove(lease)
            for layer in lease.layers:
                layer.leases -= 1
            for model in lease.models:
                model.leases -= 1
        while self.line and self._fits(self.line[0]):
            self._admit(self.line.pop(0))

    def step(self) -> bool:
        for ticket in self.swapping:
            model = ticket.swaps_out
            assert model is not None
            filling = [layer.fill for layer in model.layers if layer.state == "filling"]
            if any(fill and not fill.tickets for fill in filling):
                continue  # a cancelled fill of the layer is not undone yet
            self.swapping.remove(ticket)
            for layer in model.layers:
                if layer.state == "resident" and not layer.leases:
                    self._evict_layer(layer)
            ticket.done = True
            return True
        self._blocked = False
        if not any(fill.foreground for fill in self.fills):
            self.foreground_chunks = self.background_chunks = 0
            return self._pass(True, True)
        then = self.background_chunks + 1
        background = any(not fill.foreground for fill in self.fills)
        due = background and then <= self.background_share * (self.foreground_chunks + then)
        return (due and self._pass(False, True)) or self._pass(True, False)

    # Parts.

    def _pass(self, foreground_copies: bool, background_works: bool) -> bool:
        """Do one step for the first fill that allows a step; return whether one was done."""
        for fill in sorted(self.fills, key=lambda fill: (-fill.priority, fill.serial)):
            unwanted = fill.give_way or not fill.tickets
            if not (fill.foreground or background_works or unwanted):
                continue
            if fill.copying:
                if unwanted:
                    self._undo(fill)
                    return True
                if fill.foreground and not foreground_copies:
                    continue
                if fill.foreground:
                    self.foreground_chunks += 1
                else:
                    self.background_chunks += 1
                fill.chunks += 1
                if fill.chunks == fill.layer.granules:
                    self._complete(fill)
                return True
            if not self._blocked and self._start(fill):
                return True
        return False

    def _start(self, fill: Fill) -> bool:
        """Make room and begin, or fail the ticket; return False if there will be room later."""

        urgent = max(fill.tickets, key=lambda ticket: ticket.priority)

        def spared(layer: Layer) -> bool:
            return layer in urgent.wants

        short = fill.layer.granules - self.free
        victims = self._victims(short, fill.tickets, spared) if short > 0 else []
        if victims is not None:
            for layer in victims:
                self._evict_layer(layer)
            self.free -= fill.layer.granules
            fill.layer.state = "filling"
            fill.copying = True
            if not fill.layer.granules:
                self._complete(fill)
            return True
        coming = [
            layer
            for model in self.models.values()
            for layer in model.layers
            if layer.state == "filling" and not layer.leases and not spared(layer)
        ]
        if not coming:
            self._drop(urgent, BUSY)
            return True
        self._blocked = True
        for layer in coming:
            assert layer.fill is not None
            if layer.fill.priority < fill.priority:
                layer.fill.give_way = True
        return False

    @property
    def _leased(self) -> int:
        return sum(
            layer.granules
            for model in self.models.values()
            for layer in model.layers
            if layer.leases
        )

    def _to_lease(self, layers: list[Layer]) -> int:
        return granules([layer for layer in layers if not layer.leases])

    def _require_room(self, layers: list[Layer]) -> None:
        if self._leased + self._to_lease(layers) > self.capacity:
            raise Refused(TOO_LARGE if granules(layers) > self.capacity else BUSY)

    def _request(self, ticket: Ticket) -> Ticket:
        for layer in ticket.wants:
            if layer.state == "resident":
                continue
            if layer.fill is None:
                self.serial += 1
                layer.fill = Fill(layer, ticket.priority, self.serial)
                self.fills.append(layer.fill)
            layer.fill.tickets.append(ticket)
            ticket.fills.append(layer.fill)
            self._rerank(layer.fill)
        if not ticket.fills:
            self._settle(ticket)
        return ticket

    def _rerank(self, fill: Fill) -> None:
        if fill.tickets:
            priority = max(ticket.priority for ticket in fill.tickets)
            if priority > fill.priority:
                self.serial += 1
                fill.serial = self.serial
            fill.priority = priority

    def _settle(self, ticket: Ticket) -> None:
        if ticket.swaps_out and not ticket.short_of:
            self.swapping.append(ticket)
        else:
            ticket.done, ticket.error = True, ticket.short_of

    def _drop(self, ticket: Ticket, error: str) -> None:
        for fill in ticket.fills:
            fill.tickets.remove(ticket)
            if not fill.tickets and not fill.copying:
                self._forget(fill)
            self._rerank(fill)
        ticket.fills = []
        if not ticket.done:
            ticket.done, ticket.error = True, error

    def _drop_layers(self, layers: list[Layer]) -> None:
        for fill in [layer.fill for layer in layers if layer.fill]:
            tickets, fill.tickets = fill.tickets, []
            for ticket in tickets:
                ticket.fills.remove(fill)
                ticket.short_of = CANCELLED
                if not ticket.fills:
                    ticket.done, ticket.error = True, CANCELLED
            if not fill.copying:
                self._forget(fill)

    def _forget(self, fill: Fill) -> None:
        fill.layer.fill = None
        self.fills.remove(fill)

    def _complete(self, fill: Fill) -> None:
        self.clock += 1
        fill.layer.state, fill.layer.filled_at = "resident", self.clock
        self._forget(fill)
        for ticket in fill.tickets:
            ticket.fills.remove(fill)
            if not ticket.fills:
                self._settle(ticket)

    def _undo(self, fill: Fill) -> None:
        fill.layer.state = "absent"
        self.free += fill.layer.granules
        if fill.tickets:
            fill.copying = fill.give_way = False
            fill.chunks = 0
        else:
            self._forget(fill)

    def _evict_layer(self, layer: Layer) -> None:
        layer.state = "absent"
        self.free += layer.granules

    def _victims(
        self, granules: int, tickets: list[Ticket], spared: Callable[[Layer], bool]
    ) -> list[Layer] | None:
        """Choose layers to evict, one at a time, from those that each model offers."""
        first = None
        for ticket in tickets:
            first = ticket.swaps_out or first
        below = max(ticket.evict_below for ticket in tickets)
        chosen: list[Layer] = []
        while sum(layer.granules for layer in chosen) < granules:
            offered = []
            for model in self.models.values():
                candidates = [
                    layer
                    for layer in model.layers
                    if layer.state == "resident"
                    and layer.granules
                    and not layer.leases
                    and not spared(layer)
                    and (layer.keep_value < below or model is first)
                    and layer not in chosen
                ]
                if candidates:
                    offered.append(min(candidates, key=lambda x: (x.keep_value, -x.index)))
            if not offered:
                return None
            chosen.append(
                min(
                    offered,
                    key=lambda layer: (
                        layer.model is not first,
                        layer.keep_value,
                        max(layer.filled_at, layer.model.last_use),
                        layer.model.serial,
                    ),
                )
            )
        return chosen

    def _fits(self, lease: Lease) -> bool:
        return self._leased + self._to_lease(lease.layers) <= self.capacity

    def _nested(self, lease: Lease) -> bool:
        own = {x for other in self.admitted if other.owner == lease.owner for x in other.layers}
        return own.issuperset(lease.layers)

    def _admit(self, lease: Lease) -> None:
        for layer in lease.layers:
            layer.leases += 1
        for model in lease.models:
            model.leases += 1
            self.clock += 1
            model.last_use = self.clock
        lease.admitted, lease.in_line = True, False
        self.admitted.append(lease)
        if any(layer.state != "resident" for layer in lease.layers):
            lease.ticket = self._request(Ticket(FOREGROUND, lease.layers))

    def _stuck(self) -> bool:
        """Return whether a lease in line can never be served, even if owners not in line release
        all that they hold."""
        line = list(self.line)
        admitted = list(self.admitted)
        while line:
            waiting = {lease.owner for lease in line}
            admitted = [lease for lease in admitted if lease.owner in waiting]
            head = line.pop(0)
            if (
                granules(list({x for lease in [*admitted, head] for x in lease.layers}))
                > self.capacity
            ):
                return True
            admitted.append(head)
        return False
