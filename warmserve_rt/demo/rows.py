"""Four ways to get a tenant's weights under a module, each a row of the demo's table."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from warmserve_rt import Busy, Runtime, Ticket, testing
from warmserve_rt.demo.content import Content
from warmserve_rt.demo.prewarmer import rank
from warmserve_rt.engines import transformers as engine


class Row:
    """One way; `name` is its key in the report, `title` its line in the table."""

    name = ""
    title = ""

    def ready(self, tenant: str) -> bool:
        """Whether a request for `tenant` would find its weights in memory."""
        raise NotImplementedError

    def serving(self, tenant: str) -> AbstractContextManager[Any]:
        """Gives a module with the tenant's weights, which stay while the context lasts."""
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


class Reload(Row):
    """One model in memory at a time, read by safetensors into fresh memory at every switch."""

    name = "reload"
    title = "reload"

    def __init__(self, tenants: Mapping[str, Path]) -> None:
        self._tenants = tenants
        # The tenants differ in weights alone, so one module serves them all.
        config = AutoConfig.from_pretrained(next(iter(tenants.values())))
        self._module = engine.skeleton(config, torch.float32)
        self._current = ""
        self._moved = 0

    def ready(self, tenant: str) -> bool:
        return tenant == self._current

    @contextmanager
    def serving(self, tenant: str) -> Iterator[Any]:
        if tenant != self._current:
            engine.bind(self._module, self._read(self._tenants[tenant] / "model.safetensors"))
            self._current = tenant
        yield self._module

    def bytes_moved(self) -> int:
        return self._moved

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        self._moved += sum(tensor.nbytes for tensor in tensors.values())
        return tensors


class Mapped(Reload):
    """The same, but the file is mapped and nothing is copied: the system's page cache serves."""

    name = "mmap"
    title = "lazy mmap"

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        return load_file(path)


class OnDemand(Row):
    """All tenants registered in one runtime; a lease loads what is missing."""

    name = "on_demand"
    title = "on demand"

    def __init__(
        self,
        tenants: Mapping[str, Path],
        contents: Mapping[str, Content],
        arena: int,
        mutation: random.Random | None = None,
    ) -> None:
        self._contents = contents
        self._mutation = mutation
        self._runtime = Runtime(device="host", arena=arena, loaders=1)
        try:
            self._modules: dict[str, Any] = {
                name: engine.load(self._runtime, path, name=name) for name, path in tenants.items()
            }
        except BaseException:
            self._runtime.close()
            raise

    def ready(self, tenant: str) -> bool:
        return self._runtime.snapshot().models[tenant].resident

    @contextmanager
    def serving(self, tenant: str) -> Iterator[Any]:
        with self._runtime.lease(tenant) as lease:
            self._leased = lease
            if self._mutation:
                self._mutate(tenant, self._mutation)
            yield self._modules[tenant]

    def bytes_match(self, tenant: str) -> bool:
        """Compares every tensor where the engine reads it: at the model's own addresses."""
        content, tensors = self._contents[tenant], self._leased.tensors
        return all(content.equals(name, tensors[name]) for name in tensors)

    def bytes_moved(self) -> int:
        return self._runtime.snapshot().bytes_loaded

    def occupancy(self) -> float:
        snapshot = self._runtime.snapshot()
        return 1 - snapshot.granules_free / snapshot.granules

    def close(self) -> None:
        self._modules.clear()
        self._runtime.close()

    def _mutate(self, tenant: str, random_: random.Random) -> None:
        """Swap a granule with another tenant's, once: the demo must then say that it failed."""
        others = [name for name in self._modules if name != tenant and self.ready(name)]
        if not others:
            return
        other = random_.choice(others)
        layer = random_.choice(self._contents[tenant].layers_all_different(self._contents[other]))
        models = [self._modules[name].warmserve_model for name in (tenant, other)]
        granule = random_.randrange(len(self._contents[tenant].granules[layer]))
        testing.swap_granules(self._runtime, models[0], layer, models[1], layer, granule=granule)
        self._mutation = None


class Prewarmed(OnDemand):
    """And the demo's policy brings in beforehand whom it expects next."""

    name = "prewarmed"
    title = "prewarmed"

    def __init__(
        self, tenants: Mapping[str, Path], contents: Mapping[str, Content], arena: int
    ) -> None:
        super().__init__(tenants, contents, arena)
        granules = max(sum(map(len, content.granules)) for content in contents.values())
        self._room = arena // (granules * self._runtime.snapshot().granule_bytes)  # models
        self._tickets: dict[str, Ticket] = {}
        self._serving = ""

    @contextmanager
    def serving(self, tenant: str) -> Iterator[Any]:
        with super().serving(tenant) as module:
            self._serving = tenant
            yield module
        self._serving = ""

    def look_ahead(self, queue: Sequence[str], past: Sequence[str]) -> None:
        ranking = rank(queue, past, [*self._modules])
        if self._serving:
            ranking = [self._serving, *(name for name in ranking if name != self._serving)]
        for place, name in enumerate(ranking):
            self._runtime.stamp(name, keep_value=len(ranking) - place)
        wanted = ranking[: self._room]
        for name in self._tickets.keys() - wanted:
            self._tickets.pop(name).cancel()  # what has arrived of it stays until it is in the way
        for name in wanted:
            ticket = self._tickets.get(name)
            if (ticket is None or ticket.done) and not self.ready(name):
                self._tickets[name] = self._runtime.prewarm(name)

    def settle(self) -> None:
        for ticket in self._tickets.values():
            with suppress(Busy):  # a lease came first
                ticket.wait()
