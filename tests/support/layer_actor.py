"""One thread of a random program of layers, and its operations on leases.

Each operation names the refusals that it may meet. Any other exception is a failure.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from layer_world import Entry, Tape, World, tensor

from warmserve_rt import Busy, Cancelled, OutOfDeviceMemory, StaleView
from warmserve_rt.core.ticket import Ticket

Wants = list[tuple[Entry, int]]
Refusals = tuple[type[Exception], ...]
NO_ROOM: Refusals = (Busy, OutOfDeviceMemory)


@dataclass(eq=False)
class Use:
    """One acquisition of a lease."""

    lease: Any
    wants: Wants
    streaming: bool
    tape: Tape | None  # recorded at the release
    timeout: float | None = None

    def __str__(self) -> str:
        return " ".join(f"{entry}/{layer}" for entry, layer in self.wants)


@dataclass(eq=False)
class Line:
    """A lease of another owner, which may wait in line."""

    lease: Any
    wants: Wants


@dataclass
class Actor:
    world: World
    tapes: list[Tape]
    rng: random.Random = field(default_factory=random.Random)
    uses: list[Use] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    tickets: list[tuple[Ticket, Wants]] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)

    def perform(self, kind: str, rng: random.Random) -> None:
        self.rng = rng
        self.trace.append(kind)
        getattr(self, kind)()
        if self.world.pump or rng.random() < 0.05:
            self.world.check()

    def release_all(self) -> None:
        for line in self.lines:
            line.lease.release()
        for use in self.uses:
            use.lease.release()
        self.lines.clear()
        self.uses.clear()

    # Parts.

    def say(self, text: str) -> None:
        self.trace[-1] += f" {text}"

    def attempt(
        self, refusals: Refusals, call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call and return the result (True in place of None), or None after an allowed refusal."""
        try:
            result = call(*args, **kwargs)
        except refusals as error:
            refused = type(error).__name__
        except ValueError as error:  # another thread may unregister any model at any time
            if self.world.pump or "registered" not in str(error):
                raise
            refused = "unregistered"
        else:
            return True if result is None else result
        self.say(f"-> {refused}")
        self.world.count(f"refused: {refused}")
        return None

    def entry(self) -> Entry:
        return self.world.entries[self.rng.choice(self.world.names)]

    def some(self, entry: Entry) -> tuple[Any, list[int]]:
        """Choose layers of a model; return them in one of the accepted forms and as indices."""
        every = list(range(len(entry.layers)))
        if self.rng.random() < 0.4:
            return None, every
        chosen = sorted(self.rng.sample(every, self.rng.randint(1, len(every))))
        if chosen == every[: len(chosen)] and self.rng.random() < 0.5:
            return len(chosen), chosen
        shuffled = self.rng.sample(chosen, len(chosen))
        names = [layer.name for layer in entry.model.layers]
        return [names[i] if self.rng.random() < 0.3 else i for i in shuffled], chosen

    def some_tape(self) -> Tape | None:
        return self.rng.choice([None, None, *self.tapes])

    def filling(self, wants: Wants) -> bool:
        return any("filling" in self.world.states(entry, [i]) for entry, i in wants)

    # Operations.

    def lease(self) -> None:
        rng = self.rng
        timeout = rng.choice([None, None, None, 0.0 if self.world.pump else 0.01])
        streaming = rng.random() < 0.5
        names = rng.sample(self.world.names, rng.choices([1, 2, 3], [12, 2, 1])[0])
        entries = [self.world.entries[name] for name in names]
        layers, chosen = self.some(entries[0])
        wants = [(entries[0], i) for i in chosen]
        if len(entries) > 1:
            layers, wants = None, [(e, i) for e in entries for i in range(len(e.layers))]
        models = [entry.model for entry in entries]
        lease = self.attempt(
            (),
            self.world.runtime.lease,
            models,
            layers=layers,
            streaming=streaming,
            timeout=timeout,
        )
        if lease:
            self.acquire(Use(lease, wants, streaming, self.some_tape(), timeout))

    def acquire(self, use: Use) -> None:
        self.say(f"{'streaming ' if use.streaming else ''}{use} {use.timeout}:")
        refusals = NO_ROOM
        if self.world.pump:  # without a line, whether the lease fits is known exactly
            refusals = NO_ROOM if self.lines or not self.world.fits(use.wants) else ()
        else:
            refusals += (Cancelled,)  # another thread unregistered a model during the wait
        if use.timeout is not None:
            refusals += (TimeoutError,)
        if not self.attempt(refusals, use.lease.acquire, use.tape and use.tape.stream):
            return
        self.uses.append(use)
        if not use.streaming:
            self.world.count("leases, complete")
            for entry, layer in use.wants:
                self.read(use, entry, layer)
            return
        missing = any(self.world.states(entry, [i]) != ["resident"] for entry, i in use.wants)
        self.world.count(
            f"leases, streaming, {'a layer missing' if missing else 'all layers resident'}"
        )
        if self.rng.random() < 0.5:
            for entry, layer in use.wants:
                self.read(use, entry, layer)

    def read(self, use: Use, entry: Entry, layer: int) -> None:
        """Wait for a layer of a lease, on the host or on a stream, and compare its bytes."""
        said = self.rng.choice([layer, entry.model.layers[layer].name])
        ways = ["now", "host", "stream", "any lease"]
        way = self.rng.choices(ways, [0 if use.streaming else 2, 2, 4, 1])[0]
        self.say(f"{way} {entry}/{layer}")
        if way in ("now", "host"):
            if way == "host":
                use.lease.wait(said, model=entry.model)
            _ = use.lease.of(entry.model)[tensor(layer)]
            self.world.read(entry, layer)
            return
        tape = self.rng.choice(self.tapes)
        if way == "stream":
            use.lease.wait(said, tape.stream, model=entry.model)
            _ = use.lease.of(entry.model)[tensor(layer)]
        else:
            entry.model.wait(layer, tape.stream)
        if self.filling([(entry, layer)]):
            self.world.count("copies ordered behind a layer that is still filling")
        tape.copy(entry, layer)
        if tape is not use.tape or self.rng.random() < 0.1:
            use.lease.record(tape.stream)

    def join(self) -> None:
        """Acquire again a lease of this thread, or a lease that all threads share."""
        if not self.world.pump and self.rng.random() < 0.6:
            entry = self.entry()
            wants = [(entry, i) for i in range(len(entry.layers))]
            self.acquire(Use(entry.common, wants, entry.streaming, self.some_tape()))
        elif self.uses:
            use = self.rng.choice(self.uses)
            self.acquire(Use(use.lease, use.wants, use.streaming, self.some_tape(), use.timeout))

    def use(self) -> None:
        if self.uses:
            use = self.rng.choice(self.uses)
            self.read(use, *self.rng.choice(use.wants))

    def release(self) -> None:
        if not self.uses:
            return
        lease = self.rng.choice(self.uses).lease
        use = [each for each in self.uses if each.lease is lease][-1]  # a lease releases the latest
        self.say(str(use))
        if self.filling(use.wants):
            self.world.count("leases released during a fill")
        self.uses.remove(use)
        lease.release()

    def line(self) -> None:
        """Begin or end a lease of another owner, which waits in line while this thread steps."""
        if len(self.lines) < 3 and self.rng.random() < 0.5:
            entry, owner = self.entry(), self.rng.randint(1, 3)
            layers, chosen = self.some(entry)
            self.say(f"of {owner} for {entry} {chosen}")
            begin = self.world.runtime.native.begin_lease
            lease = self.attempt(NO_ROOM, begin, [entry.model.native], owner, layers and chosen)
            if lease:
                self.lines.append(Line(lease, [(entry, i) for i in chosen]))
            return
        if not self.lines:
            return
        line = self.rng.choice(self.lines)
        if line.lease.ready():
            entry = line.wants[0][0]
            replaced = self.world.entries[entry.model.name] is not entry
            if self.attempt((Cancelled,) if replaced else (), line.lease.wait, 0):
                self.world.count("leases, complete, after a line")
                for entry, layer in line.wants:
                    self.world.read(entry, layer)
        elif self.rng.random() < 0.5:
            return
        self.say("released")
        self.lines.remove(line)
        line.lease.release()

    def intrude(self) -> None:
        """Use a shared lease without holding it, while others may acquire or release it."""
        entry = self.entry()
        if self.rng.random() < 0.5:
            self.attempt((StaleView,), entry.common.record, self.rng.choice(self.tapes).stream)
        else:
            layer = self.rng.randrange(len(entry.layers))
            self.attempt((StaleView, TimeoutError), entry.common.wait, layer, timeout=0.01)
