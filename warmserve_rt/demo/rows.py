"""Ways to bring a tenant's weights to an engine, each a row of the demo's table."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

from warmserve_rt import Model, Runtime, testing

from .prewarmer import Prewarmer

# (prompt, count, end) -> greedy tokens, each as soon as it is known: `count` of them, or fewer if
# the token `end` ends the answer (-1: no token does).
Say: TypeAlias = Callable[[list[int], int, int], Iterator[int]]


class Row:
    """One way. `name` is its key in the report, `title` its label in the table."""

    name = ""
    title = ""

    def ready(self, tenant: str) -> bool:
        """Return whether a request for `tenant` would find its weights in memory."""
        raise NotImplementedError

    def serving(self, tenant: str) -> AbstractContextManager[Say]:
        """Yield a function that answers as the tenant while the context lasts."""
        raise NotImplementedError

    def look_ahead(self, queue: Sequence[str], past: Sequence[str]) -> None:
        """Plan ahead; called when serving of a tenant begins or ends and when a request arrives."""

    def settle(self) -> None:
        """Wait until no background load is running."""

    def bytes_match(self, tenant: str) -> bool | None:
        """Return whether the served tenant has the bytes of its file; None if not checked."""
        return None

    def bytes_moved(self) -> int:
        """Return the bytes copied into memory so far."""
        return 0

    def occupancy(self) -> float | None:
        """Return the share of the arena that holds weights, or None without an arena."""
        return None

    def close(self) -> None:
        """Release all memory."""


class InArena(Row):
    """All tenants in one runtime, which loads missing layers on demand. Owns the runtime.

    Parameters
    ----------
    runtime : Runtime
        The runtime; :meth:`close` closes it.
    models : mapping of tenant to Model
        The tenants' models.
    prewarm : bool
        Let the demo's policy prewarm the tenants that it expects next.
    mutation : random.Random, optional
        Choose a granule and swap it with another tenant's, once. The demo must then report failure.
    """

    def __init__(
        self,
        runtime: Runtime,
        models: Mapping[str, Model],
        *,
        prewarm: bool = False,
        mutation: random.Random | None = None,
    ) -> None:
        self.name, self.title = ("prewarmed",) * 2 if prewarm else ("on_demand", "on demand")
        self.runtime, self._models = runtime, models
        self._prewarmer = Prewarmer(runtime, models) if prewarm else None
        self._mutation = mutation
        self._serving = ""

    @contextmanager
    def serving(self, tenant: str) -> Iterator[Say]:
        with self.answering(tenant) as say:
            self._serving = tenant
            yield say
        self._serving = ""

    def answering(self, tenant: str) -> AbstractContextManager[Say]:
        """Do the work of :meth:`serving`."""
        raise NotImplementedError

    def ready(self, tenant: str) -> bool:
        return self.runtime.snapshot().models[self._models[tenant].name].resident

    def look_ahead(self, queue: Sequence[str], past: Sequence[str]) -> None:
        if self._prewarmer:
            self._prewarmer.look_ahead(self._serving, queue, past)

    def settle(self) -> None:
        if self._prewarmer:
            self._prewarmer.settle()

    def bytes_moved(self) -> int:
        return self.runtime.snapshot().bytes_loaded

    def occupancy(self) -> float:
        snapshot = self.runtime.snapshot()
        return 1 - snapshot.granules_free / snapshot.granules

    def close(self) -> None:
        self.runtime.close()

    def differing(self, tenant: str, other: str) -> list[tuple[int, int]]:
        """Return (layer, granule) of each difference between two tenants' bytes."""
        raise NotImplementedError

    def mutate(self, tenant: str) -> None:
        """Swap a granule of the leased tenant, if a mutation was requested and not done yet."""
        others = [name for name in self._models if name != tenant and self.ready(name)]
        if not (self._mutation and others):
            return
        other = self._mutation.choice(others)
        layer, granule = self._mutation.choice(self.differing(tenant, other))
        models = self._models[tenant], self._models[other]
        testing.swap_granules(self.runtime, models[0], layer, models[1], layer, granule=granule)
        self._mutation = None
