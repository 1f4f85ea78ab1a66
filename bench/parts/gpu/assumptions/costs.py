"""The costs of calls on ranges; the simulator assumes a + b x granules.

Each cost is the minimum of several rounds, because other load is not part of it. A call from Python
takes about a microsecond more than from C; bench/driver_ops.py measures the exact costs.
"""

from __future__ import annotations

from collections.abc import Callable

from lib.cuda import Gpu, microseconds

from . import GRANULE, GUESS, Refuted, assumed

_COUNTS = (1, 4, 16, 64, 256)
_ROUNDS = 15
_TOLERANCE = 0.3  # largest accepted difference, relative to the measured cost

Samples = dict[int, float]  # number of granules -> microseconds of one call


def fit(samples: Samples) -> tuple[float, float, float]:
    """Return a and b of the fit by relative least squares, and its largest relative difference."""
    points = [(n, t, 1 / t**2) for n, t in samples.items()]
    weight = sum(w for _, _, w in points)
    n_mean = sum(w * n for n, _, w in points) / weight
    t_mean = sum(w * t for _, t, w in points) / weight
    spread = sum(w * (n - n_mean) ** 2 for n, _, w in points)
    b = sum(w * (n - n_mean) * (t - t_mean) for n, t, w in points) / spread
    a = t_mean - b * n_mean
    return a, b, max(abs(a + b * n - t) / t for n, t in samples.items())


def _cycles(cuda: Gpu) -> dict[str, Samples]:
    """Return costs by call and granules: one call for all granules; for map, one call each."""
    taken: dict[str, dict[int, list[float]]] = {}
    most = max(_COUNTS)
    handles = [cuda.create(GRANULE) for _ in range(most)]
    address = cuda.reserve(most * GRANULE)

    def note(call: str, count: int, spent: float) -> None:
        taken.setdefault(call, {}).setdefault(count, []).append(spent)

    for count in _COUNTS * _ROUNDS:

        def map_all(count: int = count) -> None:
            for i in range(count):
                cuda.map(address + i * GRANULE, GRANULE, handles[i])

        note("map", count, microseconds(map_all))
        note("set access", count, microseconds(cuda.set_access, address, count * GRANULE))
        note("read-only", count, microseconds(cuda.set_access, address, count * GRANULE, 1))
        note("unmap", count, microseconds(cuda.unmap, address, count * GRANULE))
    return {
        call: {count: min(values) for count, values in by_count.items()}
        for call, by_count in taken.items()
    }


def _sized(cuda: Gpu) -> dict[str, Samples]:
    """Return costs for one handle of n granules' bytes: does it cost as one granule or as n?"""
    taken: dict[str, Samples] = {"create": {}, "map": {}, "set access": {}, "unmap": {}}
    for count in _COUNTS:
        nbytes, rounds = count * GRANULE, []
        address = cuda.reserve(nbytes)
        for _ in range(_ROUNDS):
            made: list[int] = []
            create = microseconds(lambda size, out: out.append(cuda.create(size)), nbytes, made)
            rounds.append(
                (
                    create,
                    microseconds(cuda.map, address, nbytes, made[0]),
                    microseconds(cuda.set_access, address, nbytes),
                    microseconds(cuda.unmap, address, nbytes),
                )
            )
            cuda.release(made[0])
        for call, values in zip(taken, zip(*rounds, strict=True), strict=True):
            taken[call][count] = min(values)
    return taken


def _row(name: str, measure: Callable[[Gpu], dict[str, Samples]], call: str) -> None:
    @assumed(name, "a + b x granules", GUESS, alone=True)
    def _(cuda: Gpu) -> str:
        samples = measure(cuda)[call]
        a, b, worst = fit(samples)
        points = ", ".join(f"{count}: {spent:.1f}" for count, spent in samples.items())
        found = f"{a:.1f} + {b:.2f} n us, off by {100 * worst:.0f} % at most ({points})"
        if worst > _TOLERANCE:
            raise Refuted(found)
        return found


for _call in ("map", "set access", "read-only", "unmap"):
    _row(f"cost: {_call}, n granules", _cycles, _call)
for _call in ("create", "map", "set access", "unmap"):
    _row(f"cost: {_call}, one handle n times as large", _sized, _call)
