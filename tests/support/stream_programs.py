"""Random programs of streams, events and copies, and the operations that race in them.

The expected races follow from CUDA's documented ordering alone: there are no clocks, only a graph
and all its paths.

    cuda = SimulatedCuda of testing.simulated_cuda(...)
    program = generate(seed)
    observed = observed_races(cuda, program)
    assert observed.races == expected_races(program, observed.completed)

Both the expected and the observed set name an operation by its index in ``Program.ops``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from warmserve_rt.testing.cuda_api import BLOCKING, LEGACY, NON_BLOCKING, Cuda
from warmserve_rt.testing.simcuda import SimulatedCuda

GRANULE = 2 << 20
DEVICE = 2 * GRANULE  # two granules, mapped in both orders
PINNED = 4096
WORK = ("htod", "dtoh", "dtod", "memset", "htod_now", "dtoh_now")
FROM_PINNED, TO_PINNED = ("htod", "htod_now"), ("dtoh", "dtoh_now")


class Access(NamedTuple):
    memory: str
    begin: int
    end: int
    write: bool


@dataclass(frozen=True)
class Op:
    """One call. ``to`` and ``at`` are device offsets in one of two aliases of the same granules."""

    # One of WORK ("now": in the legacy stream, and the host waits for it), or record or wait, or an
    # operation of the host alone: sync_event, sync_stream, sync_all, query.
    kind: str
    stream: int = 0
    event: int = 0
    alias: int = 0
    to: int = 0  # offset written: on the device, for dtoh in pinned memory
    at: int = 0  # offset read: on the device, for htod in pinned memory
    nbytes: int = 0

    @property
    def by_host(self) -> bool:
        return self.kind in ("sync_event", "sync_stream", "sync_all", "query")

    @property
    def host_waits(self) -> bool:
        return self.by_host or self.kind in ("htod_now", "dtoh_now")

    def accesses(self) -> list[Access]:
        if self.kind not in WORK:
            return []
        to = "pinned" if self.kind in TO_PINNED else "device"
        found = [*self._memory(to, self.to, True)]
        if self.kind != "memset":
            at = "pinned" if self.kind in FROM_PINNED else "device"
            found += self._memory(at, self.at, False)
        return found

    def _memory(self, memory: str, begin: int, write: bool) -> Iterator[Access]:
        """Yield the accesses in physical memory: the second alias maps the granules reversed."""
        end = begin + self.nbytes
        if memory == "pinned" or self.alias == 0:
            yield Access(memory, begin, end, write)
            return
        for low, high, shift in ((0, GRANULE, GRANULE), (GRANULE, DEVICE, -GRANULE)):
            if max(begin, low) < min(end, high):
                yield Access(memory, max(begin, low) + shift, min(end, high) + shift, write)


@dataclass(frozen=True)
class Program:
    streams: tuple[str, ...]  # each legacy, blocking or non-blocking; the first is legacy
    events: int
    ops: tuple[Op, ...]


def generate(seed: int | random.Random, length: int = 40, *, race_free: bool = False) -> Program:
    """Return a random program; with ``race_free``, calls are added that order racing operations."""
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    kinds = ("blocking", "non-blocking")
    streams = ("legacy", *(rng.choice(kinds) for _ in range(rng.randint(1, 4))))
    program = Program(streams, rng.randint(1, 4), ())
    while len(program.ops) < length:
        op = _random_op(rng, program)
        if race_free:
            while len(program.ops) in expected_races(_with(program, op)):
                program = _with(program, *_ordering(rng, program, op))
        program = _with(program, op)
    return program


def _with(program: Program, *ops: Op) -> Program:
    return replace(program, ops=program.ops + ops)


def _random_op(rng: random.Random, program: Program) -> Op:
    stream = rng.randrange(len(program.streams))
    event = rng.randrange(program.events)
    kind = rng.choices(
        [*WORK, "record", "wait", "sync_event", "sync_stream", "sync_all", "query"],
        [8, 6, 4, 6, 0.5, 0.5, 8, 8, 2, 1, 0.3, 2],
    )[0]
    if kind.endswith("_now"):
        stream = 0
    if kind == "sync_stream" and stream == 0:
        kind = "sync_event"  # CUDA does not document whether this is an operation in that stream
    nbytes = rng.choice([1, 2, 7, 16, 33, 64])
    # Few offsets, so that accesses often overlap.
    hot = [0, 40, GRANULE - 64, GRANULE - 8, GRANULE, GRANULE + 24, DEVICE - 128]
    place = [rng.choice(hot) + rng.choice([0, 0, 1, 13, 32]) for _ in range(2)]
    if kind in FROM_PINNED:
        place[1] = rng.randrange(128)
    if kind in TO_PINNED:
        place[0] = rng.randrange(128)
    if kind == "dtod" and abs(place[0] - place[1]) < nbytes:
        place[0] = (place[1] + GRANULE + 256) % (DEVICE - 512)
    return Op(kind, stream, event, rng.randrange(2), *place, nbytes)


def _ordering(rng: random.Random, program: Program, op: Op) -> list[Op]:
    """Return calls after which ``op`` no longer races with the last operation it raced with."""
    together = _with(program, op)
    racers = [i for i, j in racing_pairs(together) if j == len(program.ops)]
    stream, event = program.ops[racers[-1]].stream, rng.randrange(program.events)
    record = Op("record", stream, event)
    choices = [[record, Op("wait", op.stream, event)], [record, Op("sync_event", event=event)]]
    if stream != 0:
        choices.append([Op("sync_stream", stream)])
    return rng.choices(choices, [6, 1, 1][: len(choices)])[0]


def predecessors(program: Program, completed: Sequence[int] = ()) -> list[int]:
    """Return for each operation the set, as bits, of the operations that CUDA orders before it.

    ``completed`` lists the queries that found their event complete: the host then knows that the
    event's work is over.
    """
    before: list[int] = []
    recorded: dict[int, int] = {}  # event: the call that recorded it last
    nothing = set()  # waits for events that were never recorded, which CUDA documents as no-ops
    for i, op in enumerate(program.ops):
        # The host makes its calls in order, so all later calls follow what it has waited for.
        edges = {j for j in range(i) if program.ops[j].host_waits}
        if op.kind == "wait" and op.event not in recorded:
            nothing.add(i)  # has no place in the stream that a synchronise could wait for
            before.append(0)
            continue
        if op.kind in ("wait", "sync_event") or i in completed:
            edges |= {recorded[op.event]} if op.event in recorded else set()
        elif op.kind == "sync_stream":
            edges |= {j for j in range(i) if program.ops[j].stream == op.stream}
        elif op.kind == "sync_all":
            edges |= set(range(i))
        if not op.by_host:
            kind = program.streams[op.stream]
            for j in set(range(i)) - nothing:
                other = program.ops[j]
                same = other.stream == op.stream
                pair = {kind, program.streams[other.stream]}  # the legacy stream and blocking ones
                if not other.by_host and (same or pair == {"legacy", "blocking"}):
                    edges.add(j)
        if op.kind == "record":
            recorded[op.event] = i
        closure = 0
        for j in edges:
            closure |= before[j] | 1 << j
        before.append(closure)
    return before


def racing_pairs(program: Program, completed: Sequence[int] = ()) -> list[tuple[int, int]]:
    before = predecessors(program, completed)
    accesses = [op.accesses() for op in program.ops]
    return [
        (i, j)
        for j in range(len(program.ops))
        for i in range(j)
        if not before[j] >> i & 1 and _conflict(accesses[i], accesses[j])
    ]


def _conflict(first: Sequence[Access], second: Sequence[Access]) -> bool:
    return any(
        a.memory == b.memory and a.begin < b.end and b.begin < a.end and (a.write or b.write)
        for a in first
        for b in second
    )


def expected_races(program: Program, completed: Sequence[int] = ()) -> set[int]:
    """Return the later operation of each unordered pair that shares bytes, if one writes."""
    return {j for _, j in racing_pairs(program, completed)}


def plant(program: Program, seed: int | random.Random) -> Program | None:
    """Return a race-free program without one of its ordering calls, so that it races.

    Return None if no single ordering call is needed.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    ordering = [i for i, op in enumerate(program.ops) if op.kind not in (*WORK, "query")]
    rng.shuffle(ordering)
    for i in ordering:
        without = replace(program, ops=program.ops[:i] + program.ops[i + 1 :])
        if expected_races(without):
            return without
    return None


class Observed(NamedTuple):
    races: set[int]
    completed: tuple[int, ...]  # the queries that found their event complete
    others: list[str]  # violations of other kinds


def observed_races(simulated: SimulatedCuda, program: Program) -> Observed:
    """Run the program on a simulated driver that was started for it."""
    cuda = Cuda(simulated.library).start()
    aliases = [cuda.reserve(DEVICE), cuda.reserve(DEVICE)]
    handles = [cuda.create(GRANULE), cuda.create(GRANULE)]
    for address, order in zip(aliases, (handles, handles[::-1]), strict=True):
        for i, handle in enumerate(order):
            cuda.map(address + i * GRANULE, GRANULE, handle)
        cuda.set_access(address, DEVICE)
    pinned = cuda.pinned(PINNED)
    flags = {"blocking": BLOCKING, "non-blocking": NON_BLOCKING}
    streams = [LEGACY, *(cuda.stream(flags[kind]) for kind in program.streams[1:])]
    events = [cuda.event() for _ in range(program.events)]
    cuda.memset(aliases[0], 1, DEVICE, streams[-1])  # so that no read finds uninitialised memory
    cuda.synchronize(streams[-1])

    calls_before = sum(simulated.calls.values())
    completed = []
    for i, op in enumerate(program.ops):
        stream, event, base = streams[op.stream], events[op.event], aliases[op.alias]
        match op.kind:
            case "htod":
                cuda.htod(base + op.to, pinned.address + op.at, op.nbytes, stream)
            case "dtoh":
                cuda.dtoh(pinned.address + op.to, base + op.at, op.nbytes, stream)
            case "htod_now":
                cuda.htod(base + op.to, pinned.address + op.at, op.nbytes)
            case "dtoh_now":
                cuda.dtoh(pinned.address + op.to, base + op.at, op.nbytes)
            case "dtod":
                cuda.dtod(base + op.to, base + op.at, op.nbytes, stream)
            case "memset":
                cuda.memset(base + op.to, i % 256, op.nbytes, stream)
            case "record":
                cuda.record(event, stream)
            case "wait":
                cuda.wait(stream, event)
            case "sync_event":
                cuda.event_synchronize(event)
            case "sync_stream":
                cuda.synchronize(stream)
            case "sync_all":
                cuda.context_synchronize()
            case "query":
                if cuda.done(event):
                    completed.append(i)
    cuda.context_synchronize()
    found = simulated.violations
    return Observed(
        {each.call - calls_before - 1 for each in found if each.kind == "race"},
        tuple(completed),
        [str(each) for each in found if each.kind != "race"],
    )
