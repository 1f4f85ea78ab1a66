"""The operations of one thread of a random program of layers besides leases, and their weights."""

from __future__ import annotations

import math
import random
import time

from layer_actor import NO_ROOM, Actor
from layer_world import Failed

from warmserve_rt import Busy, Cancelled, StaleView
from warmserve_rt.core.ticket import Ticket

PUMP = {
    "lease": 12,
    "join": 3,
    "use": 6,
    "release": 13,
    "line": 5,
    "prewarm": 14,
    "late": 0.4,
    "cancel": 8,
    "outcome": 2,
    "evict": 8,
    "swap": 5,
    "replace": 2,
    "peek": 2,
    "set_keep_value": 2,
    "trim": 1,
    "step": 14,
    "synchronize": 1,
}
OUTCOMES = (Busy, Cancelled, TimeoutError)  # of tickets; TimeoutError: the deadline or the wait
THREADED = {**PUMP, "line": 0, "intrude": 3, "release": 16, "step": 4}


def operations(rng: random.Random, *, threaded: bool) -> list[str]:
    weights = THREADED if threaded else PUMP
    return rng.choices(list(weights), list(weights.values()), k=rng.randint(30, 60))


class Operations(Actor):
    def request(self, deadline: float | None) -> Ticket | None:
        entry = self.entry()
        layers, chosen = self.some(entry)
        priority = self.rng.choice([0, 0, 50, 100])
        self.say(f"{entry} {chosen} {priority=}")
        prewarm = self.world.runtime.prewarm
        ticket: Ticket | None = self.attempt(
            NO_ROOM,
            prewarm,
            entry.model,
            layers=layers,
            priority=priority,
            deadline=deadline,
            evict_below=self.rng.choice([math.inf, math.inf, 2.5, 0.0]),
        )
        if ticket:
            self.tickets.append((ticket, [(entry, i) for i in chosen]))
        return ticket

    def prewarm(self) -> None:
        self.request(self.rng.choice([None, None, 1000, 2000]))

    def late(self) -> None:
        """Request layers with a deadline that passes, perhaps during a fill."""
        ticket = self.request(0.003)
        self.go_on(self.rng.randint(0, 2))
        time.sleep(0.004)
        self.go_on(1)
        if ticket and self.world.pump and not ticket.done:
            raise Failed("a ticket is not done after its deadline")

    def cancel(self) -> None:
        if not self.tickets:
            return
        at = self.rng.randrange(len(self.tickets))
        ticket, wants = self.tickets[at] if self.rng.random() < 0.3 else self.tickets.pop(at)
        self.say(f"{wants[0][0]}")
        if not ticket.done and self.filling(wants):
            self.world.count("tickets cancelled during a fill")
        for _ in range(self.rng.randint(1, 2)):
            ticket.cancel()
        if not ticket.done:
            raise Failed("a cancelled ticket is not done")

    def outcome(self) -> None:
        if not self.tickets:
            return
        ticket, wants = self.rng.choice(self.tickets)
        layer, timeout = self.rng.choice([None, wants[0][1]]), self.rng.choice([None, 0])
        self.say(f"{wants[0][0]} {layer=} {timeout=}")
        if self.attempt(OUTCOMES, ticket.wait, timeout, layer=layer) and layer is None:
            moved, of = ticket.progress
            if not (ticket.done and moved == of):
                raise Failed(f"a ticket is done after {moved} of {of} bytes")

    def swap(self) -> None:
        old, new = (self.world.entries[name] for name in self.rng.sample(self.world.names, 2))
        priority = self.rng.choice([0, 50, 100])
        self.say(f"{old} for {new} {priority=}")
        swap = self.world.runtime.swap
        ticket = self.attempt(NO_ROOM, swap, evict=old.model, load=new.model, priority=priority)
        if not ticket:
            return
        self.tickets.append((ticket, [(new, i) for i in range(len(new.layers))]))
        if self.world.pump and self.rng.random() < 0.4 and self.attempt(OUTCOMES, ticket.wait):
            left = set(self.world.states(old, list(range(len(old.layers))))) - {"absent"}
            if left:
                raise Failed(f"a swap is done, but layers of the model swapped out are {left}")

    def evict(self) -> None:
        entry, keep = self.entry(), None
        layers, chosen = self.some(entry)
        if layers is not None and self.rng.random() < 0.4:
            layers, keep = None, layers
            chosen = [i for i in range(len(entry.layers)) if i not in chosen]
        wait = self.rng.choice(["nothing", "streams", "leases"])
        # Two threads that wait for each other's leases in evict() deadlock undetected, so they need
        # a timeout.
        timeout = 0.01 if wait == "leases" and not self.world.pump else None
        self.say(f"{entry} {chosen} {wait=}")
        if self.filling([(entry, i) for i in chosen]):
            self.world.count("evictions of filling layers")
        refusals = (Busy,) if timeout is None else (Busy, TimeoutError)
        evict = self.world.runtime.evict
        evicted = self.attempt(
            refusals, evict, entry.model, layers=layers, keep=keep, wait=wait, timeout=timeout
        )
        if evicted and self.world.pump and set(self.world.states(entry, chosen)) - {"absent"}:
            raise Failed("a layer is not absent after its eviction")

    def replace(self) -> None:
        """Unregister a model and register other content under its name."""
        entry = self.entry()
        self.say(f"{entry}")
        if self.attempt((Busy,), self.world.runtime.unregister, entry.model):
            self.attempt((), self.world.register, entry.model.name, 1 - entry.revision)

    def peek(self) -> None:
        """Read a layer that need not be leased: the bytes are right, or the read is refused."""
        entry = self.entry()
        layer = self.rng.randrange(len(entry.layers))
        self.say(f"{entry}/{layer}")
        found = self.attempt((StaleView,), self.world.runtime.read_back, entry.model, layer)
        if found is not None:
            self.world.compare(entry, layer, found)

    def set_keep_value(self) -> None:
        entry, value = self.entry(), self.rng.choice([-1.0, 0.0, 2.5])
        layer = self.rng.choice([None, self.rng.randrange(len(entry.layers))])
        self.say(f"{entry}/{layer} {value}")
        self.attempt((), self.world.runtime.set_keep_value, entry.model, value, layer=layer)

    def trim(self) -> None:
        self.world.runtime.trim()

    def step(self) -> None:
        times = self.rng.choice([1, 1, 1, 2, 3, 6])
        self.say(f"{times}")
        self.go_on(times)
        if self.world.stepped:
            for _ in range(self.rng.randint(0, 2)):
                self.rng.choice(self.tapes).stream.step()

    def go_on(self, steps: int) -> None:
        if not self.world.pump:
            time.sleep(steps * 1e-4)
            return
        for _ in range(steps):
            if not self.world.runtime.step():
                return

    def synchronize(self) -> None:
        self.rng.choice(self.tapes).check()
