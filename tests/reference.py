"""The runtime in plain Python, for a device the CPU fills directly: what the native one must do,
step for step, under ``pump``. No memory, no threads; sizes in granules."""

from __future__ import annotations

from dataclasses import dataclass, field

BUSY, CANCELLED, TOO_LARGE = "Busy", "Cancelled", "OutOfDeviceMemory"


class Refused(Exception):
    """Carries the name of the exception that the runtime raises."""


@dataclass(eq=False)
class Layer:
    model: Model
    index: int
    granules: int
    state: str = "absent"
    keep_value: float = 0.0
    filled_at: int = 0
    fill: Fill | None = None


@dataclass(eq=False)
class Model:
    name: str
    serial: int
    layers: list[Layer] = field(default_factory=list)
    holds: int = 0
    last_use: int = 0

    @property
    def granules(self) -> int:
        return sum(layer.granules for layer in self.layers)

    @property
    def missing(self) -> bool:
        return any(layer.state != "resident" for layer in self.layers)


@dataclass(eq=False)
class Ticket:
    priority: int
    swaps_out: Model | None = None
    fills: list[Fill] = field(default_factory=list)
    done: bool = False
    error: str | None = None


@dataclass(eq=False)
class Fill:
    layer: Layer
    priority: int
    serial: int
    tickets: list[Ticket] = field(default_factory=list)
    copying: bool = False
    give_way: bool = False
    chunks: int = 0  # done; a chunk is a granule here


@dataclass(eq=False)
class Hold:
    models: list[Model]
    owner: int
    ticket: Ticket | None = None
    admitted: bool = False


class Reference:
    def __init__(self, capacity: int) -> None:
        self.capacity = self.free = capacity
        self.models: dict[str, Model] = {}
        self.fills: list[Fill] = []
        self.swapping: list[Ticket] = []
        self.line: list[Hold] = []
        self.admitted: list[Hold] = []
        self.clock = self.serial = 0

    # Operations.

    def register(self, name: str, layers: list[int]) -> None:
        self.serial += 1
        model = self.models[name] = Model(name, self.serial)
        model.layers = [Layer(model, i, granules) for i, granules in enumerate(layers)]

    def unregister(self, name: str) -> None:
        self.evict(name)
        del self.models[name]

    def prewarm(self, name: str, priority: int) -> Ticket:
        model = self.models[name]
        self._require_room(model)
        return self._request(Ticket(priority), [model])

    def swap(self, evict: str, load: str, priority: int) -> Ticket:
        old, new = self.models[evict], self.models[load]
        if old.holds:
            raise Refused(BUSY)
        self._require_room(new)
        self._drop_model(old)
        return self._request(Ticket(priority, swaps_out=old), [new])

    def evict(self, name: str) -> None:
        model = self.models[name]
        while True:
            if model.holds:
                raise Refused(BUSY)
            self._drop_model(model)
            for layer in model.layers:
                if layer.state == "resident":
                    self._evict_layer(layer)
            while any(layer.state == "filling" for layer in model.layers):
                assert self.step()
            if all(layer.state == "absent" for layer in model.layers):
                return

    def cancel(self, ticket: Ticket) -> None:
        if not ticket.done:
            self._drop(ticket, CANCELLED)

    def begin_lease(self, names: list[str], owner: int) -> Hold:
        hold = Hold([self.models[name] for name in names], owner)
        if (not self.line and self._fits(hold)) or self._nested(hold):
            self._admit(hold)
            return hold
        if sum(model.granules for model in hold.models) > self.capacity:
            raise Refused(TOO_LARGE)
        self.line.append(hold)
        if self._stuck():
            self.line.remove(hold)
            raise Refused(BUSY)
        hold.ticket = Ticket(100)
        return hold

    def end_lease(self, hold: Hold) -> None:
        if hold.ticket and not hold.ticket.done:
            self._drop(hold.ticket, CANCELLED)
        if not hold.admitted:
            if hold in self.line:
                self.line.remove(hold)
        else:
            hold.admitted = False
            self.admitted.remove(hold)
            for model in hold.models:
                model.holds -= 1
        while self.line and self._fits(self.line[0]):
            self._admit(self.line.pop(0))

    def step(self) -> bool:
        if self.swapping:
            ticket = self.swapping.pop(0)
            model = ticket.swaps_out
            assert model is not None
            if not model.holds:
                for layer in model.layers:
                    if layer.state == "resident":
                        self._evict_layer(layer)
            ticket.done = True
            return True
        blocked = False
        for fill in sorted(self.fills, key=lambda fill: (-fill.priority, fill.serial)):
            if fill.copying:
                if fill.give_way or not fill.tickets:
                    self._undo(fill)
                else:
                    fill.chunks += 1
                    if fill.chunks == fill.layer.granules:
                        self._complete(fill)
                return True
            if blocked:
                continue
            short = fill.layer.granules - self.free
            victims = self._victims(short, fill) if short > 0 else []
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
                if layer.state == "filling" and model is not fill.layer.model and not model.holds
            ]
            if not coming:
                tickets, fill.tickets = fill.tickets, []
                self._forget(fill)
                for ticket in tickets:
                    ticket.fills.remove(fill)
                    self._drop(ticket, BUSY)
                return True
            blocked = True
            for layer in coming:
                assert layer.fill is not None
                if layer.fill.priority < fill.priority:
                    layer.fill.give_way = True
        return False

    # Parts.

    @property
    def _held(self) -> int:
        return sum(model.granules for model in self.models.values() if model.holds)

    def _require_room(self, model: Model) -> None:
        if model.granules > self.capacity:
            raise Refused(TOO_LARGE)
        if not model.holds and self._held + model.granules > self.capacity:
            raise Refused(BUSY)

    def _request(self, ticket: Ticket, models: list[Model]) -> Ticket:
        for model in models:
            for layer in model.layers:
                if layer.state == "resident":
                    continue
                if layer.fill is None:
                    self.serial += 1
                    layer.fill = Fill(layer, ticket.priority, self.serial)
                    self.fills.append(layer.fill)
                layer.fill.priority = max(layer.fill.priority, ticket.priority)
                layer.fill.tickets.append(ticket)
                ticket.fills.append(layer.fill)
        if not ticket.fills:
            self._settle(ticket)
        return ticket

    def _settle(self, ticket: Ticket) -> None:
        if ticket.swaps_out:
            self.swapping.append(ticket)
        else:
            ticket.done = True

    def _drop(self, ticket: Ticket, error: str) -> None:
        for fill in ticket.fills:
            fill.tickets.remove(ticket)
            if not fill.tickets and not fill.copying:
                self._forget(fill)
        ticket.fills = []
        if not ticket.done:
            ticket.done, ticket.error = True, error

    def _drop_model(self, model: Model) -> None:
        for layer in model.layers:
            for ticket in list(layer.fill.tickets) if layer.fill else []:
                self._drop(ticket, CANCELLED)

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

    def _victims(self, granules: int, fill: Fill) -> list[Layer] | None:
        first = None
        for ticket in fill.tickets:
            first = ticket.swaps_out or first
        candidates = [
            layer
            for model in self.models.values()
            if model is not fill.layer.model and not model.holds
            for layer in model.layers
            if layer.state == "resident" and layer.granules
        ]
        candidates.sort(
            key=lambda layer: (
                layer.model is not first,
                layer.keep_value,
                max(layer.filled_at, layer.model.last_use),
                layer.model.serial,
                -layer.index,
            )
        )
        chosen: list[Layer] = []
        while sum(layer.granules for layer in chosen) < granules:
            if not candidates:
                return None
            chosen.append(candidates.pop(0))
        return chosen

    def _fits(self, hold: Hold) -> bool:
        new = sum(model.granules for model in hold.models if not model.holds)
        return self._held + new <= self.capacity

    def _nested(self, hold: Hold) -> bool:
        own = {m for other in self.admitted if other.owner == hold.owner for m in other.models}
        return own.issuperset(hold.models)

    def _admit(self, hold: Hold) -> None:
        for model in hold.models:
            model.holds += 1
            self.clock += 1
            model.last_use = self.clock
        hold.admitted = True
        self.admitted.append(hold)
        if hold.ticket or any(model.missing for model in hold.models):
            hold.ticket = self._request(hold.ticket or Ticket(100), hold.models)

    def _stuck(self) -> bool:
        """Whether the head of the line is never served, though all that can release do."""
        line = list(self.line)
        holds = list(self.admitted)
        while line:
            waiting = {hold.owner for hold in line}
            holds = [hold for hold in holds if hold.owner in waiting]
            head = line.pop(0)
            models = {model for hold in [*holds, head] for model in hold.models}
            if sum(model.granules for model in models) > self.capacity:
                return True
            holds.append(head)
        return False
