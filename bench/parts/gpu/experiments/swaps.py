"""E7 and E9: the runtime's swaps out of its host cache, compared with copies alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from lib.cuda import Gpu
from lib.harness import MIB, seconds
from parts.gpu.part import NotRun, Part, arena_for
from warmserve_rt import Model, Runtime

from . import experiment

_NAME = "large"  # the checkpoint of both models
_UNIT = 2 * MIB  # that the host cache lends
_NEAR = 0.95  # share of the copies' speed that leaves nothing to gain
_SOON = 1.3  # times the copy of the first layer
_MAPPING = ("unmap", "map", "set_access")


@contextmanager
def _cached(part: Part, granule: int) -> Iterator[tuple[Runtime, Model, Model]]:
    """Yield two models in the host cache that take turns in an arena for one of them."""
    arena = arena_for(part, _NAME, granule=granule)
    cache = 2 * arena_for(part, _NAME, granule=_UNIT)
    with part.runtime(arena=arena, granule=granule, host_cache=cache) as runtime:
        a, b = (runtime.register(name, part.path(_NAME)) for name in "ab")
        for model in (a, b):
            runtime.prewarm(model, to="host").wait()
        runtime.prewarm(a).wait()
        yield runtime, a, b


def _swap(runtime: Runtime, a: Model, b: Model, streaming: bool = False) -> tuple[float, float]:
    """Exchange the models; return the seconds until the first layer, and until all are resident."""
    here = runtime.snapshot().models[a.name].granules > 0
    evict, incoming = (a, b) if here else (b, a)
    begin, first = perf_counter(), 0.0
    ticket = runtime.swap(evict=evict, load=incoming)
    if streaming:
        with runtime.lease(incoming, streaming=True, stream=None) as lease:
            lease.wait(0)
            first = perf_counter() - begin
            ticket.wait()
    ticket.wait()
    return first, perf_counter() - begin


def _mapping_seconds(runtime: Runtime) -> float:
    calls = runtime.snapshot().driver_calls
    return sum(calls[name][1] for name in _MAPPING) / 1e9


class _Copies:
    """The copies of a model's layers out of pinned memory, without a runtime."""

    def __init__(self, cuda: Gpu, layers: list[int], granule: int) -> None:
        self.cuda, self.layers, self.granule = cuda, layers, granule
        self.nbytes = max(-(-size // granule) * granule for size in layers)
        self.host = cuda.pinned(self.nbytes, b"x" * self.nbytes)
        self.address, self.stream = cuda.mapped(-(-self.nbytes // _UNIT) * _UNIT), cuda.stream()

    def layer(self, size: int, padded: bool) -> None:
        whole = -(-size // self.granule) * self.granule
        end = whole if padded else size
        for at in range(0, end, self.granule):
            nbytes = min(self.granule, end - at)
            self.cuda.htod(self.address + at, self.host.address + at, nbytes, self.stream)
        if end < whole:
            self.cuda.memset(self.address + end, 0, whole - end, self.stream)

    def all(self, padded: bool, rounds: int, first: int | None = None) -> float:
        """Return the median seconds of copying the layers, or the first ones."""

        def once() -> None:
            for size in self.layers[:first]:
                self.layer(size, padded)
            self.cuda.synchronize(self.stream)

        once()
        return statistics.median(seconds(once) for _ in range(rounds))


def _sizes(model: Model) -> list[int]:
    return [layer.nbytes for layer in model.layers]


@experiment("E7", _NAME)
def swap(part: Part) -> None:
    """Decide whether mapping calls still lengthen a swap out of the host cache.

    Expected: 40 to 42 ms for 2.1 GB in granules of 16 MiB, at least 0.95 of the speed of copies
    alone, and the first layer after at most 1.3 times its copy, because copies hide the mapping of
    all layers but the last.
    """
    rounds, granule = part.size(8, 2), part.scale(16, 2) * MIB
    with _cached(part, granule) as (runtime, a, b):
        _swap(runtime, a, b)
        mapped = _mapping_seconds(runtime)
        swaps = [_swap(runtime, a, b)[1] for _ in range(rounds)]
        mapping = (_mapping_seconds(runtime) - mapped) / rounds
        firsts = [_swap(runtime, a, b, streaming=True)[0] for _ in range(rounds)]
        nbytes, sizes = a.nbytes, _sizes(a)
        cache = runtime.snapshot().host_cache
    copies = _Copies(Gpu(), sizes, granule)
    alone, first = copies.all(False, rounds), copies.all(False, rounds, first=1)
    taken, share = statistics.median(swaps), alone / statistics.median(swaps)
    soon = statistics.median(firsts) / first
    if cache.misses:
        raise NotRun(f"{cache.misses} layers were not in the host cache {cache.error}".strip())
    part.row("swap_ms", 1e3 * taken, "ms")
    part.row("swap_gb_per_s", nbytes / taken / 1e9, "GB/s")
    part.row("copies_gb_per_s", nbytes / alone / 1e9, "GB/s")
    part.row("swap_vs_copies", share, "")
    part.row("mapping_calls_ms", 1e3 * mapping, "ms")
    part.row("first_layer_ms", 1e3 * statistics.median(firsts), "ms")
    part.row("first_layer_vs_copy", soon, "times")
    part.decide(
        "copies hide the mapping: copying before the old layers are unmapped would gain at most "
        f"{1e3 * max(taken - alone, 0):.1f} ms"
        if share >= _NEAR
        else f"{1e3 * (taken - alone):.1f} ms of a swap are not copies, beside "
        f"{1e3 * mapping:.1f} ms of mapping calls: copy before the old layers are unmapped"
    )
    part.decide(
        f"the first layer may be used after {soon:.2f} times its copy: "
        + ("soon enough" if soon <= _SOON else "its wait for unmapping must go")
    )


@experiment("E9", _NAME)
def padding(part: Part) -> None:
    """Decide which granule suits swaps, now that no padding is copied.

    Expected: padding would cost 8 to 14 % of the time in granules of 16 MiB and 3 to 5 % in those
    of 8; without it a swap out of the host cache is as fast as copies alone in granules of 8 and 16
    MiB, and bound by mapping calls in those of 2.
    """
    rounds, best = part.size(5, 2), {}
    for mib in part.scale((2, 8, 16), (2, 4)):
        with _cached(part, mib * MIB) as (runtime, a, b):
            _swap(runtime, a, b)
            taken = statistics.median(_swap(runtime, a, b)[1] for _ in range(rounds))
            sizes = _sizes(a)
        copies = _Copies(Gpu(), sizes, mib * MIB)
        exact, padded = copies.all(False, rounds), copies.all(True, rounds)
        best[mib] = exact / taken
        part.row(f"swap_{mib}MiB_gb_per_s", sum(sizes) / taken / 1e9, "GB/s")
        part.row(f"copies_{mib}MiB_gb_per_s", sum(sizes) / exact / 1e9, "GB/s")
        part.row(f"padding_{mib}MiB", padded / exact, "times")
        part.decide(
            f"granules of {mib} MiB: padding would take {padded / exact:.2f} times as long; a swap "
            + ("is as fast as copies" if best[mib] >= _NEAR else "is bound by something else")
        )
    least = min((mib for mib, share in best.items() if share >= _NEAR), default=0)
    part.decide(
        f"granules of {least} MiB suffice for swaps at the speed of copies"
        if least
        else "no size of a granule lets a swap reach the speed of copies"
    )
