"""Ways to get a tenant's weights under an engine, each a row of the demo's table."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

from warmserve_rt import Model, Runtime, testing

from .prewarmer import Prewarmer

# Of a prompt so many greedy tokens, or up to the token that ends an answer (-1: none does); each as
# soon as it is known.
Say: TypeAlias = Callable[[list[int], int, int], Iterator[int]]


class Row:
    """One way; `name` is its key in the report, `title` its line in the table."""

    name = ""
    title = ""

    def ready(self, tenant: str) -> bool:
        """Whether a request for `tenant` would find its weights in memory."""
        raise NotImplementedError

    def serving(self, tenant: str) -> AbstractContextManager[Say]:
        """Gives what answers as the tenant while the context lasts."""
        raise NotImplementedError

    def look_ahead(self, queue: Sequence[str], past: Sequence[str]) -> None:
        """Told whenever a tenant has come to be served or a request has arrived."""

    def settle(self) -> None:
        """Wait until nothing moves in the background."""

    def bytes_match(self, tenant: str) -> bool | None:
        """Whether the tenant that is served has its file's bytes; None if that is not asked."""
        return None

    def bytes_moved(self) -> int:
        """How much was copied into memory so far."""
        return 0

    def occupancy(self) -> float | None:
        """The part of the arena that holds weights, if there is an arena."""
        return None

    def close(self) -> None:
        """Give back all memory."""


class InArena(Row):
    """All tenants in one runtime, which loads what is missing when it is used; with ``prewarm`` the
    demo's policy brings in beforehand whom it expects next. Takes the runtime over.

    ``mutation`` chooses a granule that is swapped with another tenant's, once: the demo must then
    say that it failed.
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
        """As :meth:`serving`."""
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
        """Layer and granule of each place where two tenants' bytes differ."""
        raise NotImplementedError

    def mutate(self, tenant: str) -> None:
        """Swap a granule of the tenant, which is leased, if that was asked for and has not been."""
        others = [name for name in self._models if name != tenant and self.ready(name)]
        if not (self._mutation and others):
            return
        other = self._mutation.choice(others)
        layer, granule = self._mutation.choice(self.differing(tenant, other))
        models = self._models[tenant], self._models[other]
        testing.swap_granules(self.runtime, models[0], layer, models[1], layer, granule=granule)
        self._mutation = None
