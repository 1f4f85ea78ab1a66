"""The demo's policy: which tenants to prewarm, from the queue and past requests only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress

from warmserve_rt import Busy, Model, Runtime, Ticket


class Prewarmer:
    """Prewarms the highest-ranked tenants, as many as fit into the arena."""

    def __init__(self, runtime: Runtime, models: Mapping[str, Model]) -> None:
        self._runtime, self._models = runtime, models
        snapshot = runtime.snapshot()
        layers = [snapshot.models[model.name].layers for model in models.values()]
        self._room = snapshot.granules // max(sum(each.granules for each in of) for of in layers)
        self._tickets: dict[str, Ticket] = {}

    def look_ahead(self, serving: str, queue: Sequence[str], past: Sequence[str]) -> None:
        """Rank the tenants, set their keep values and prewarm the first ones. Does not block.

        Parameters
        ----------
        serving : str
            The tenant that is being served, or "". It ranks first.
        queue, past
            As in :func:`rank`.
        """
        ranking = rank(queue, past, [*self._models])
        if serving:
            ranking = [serving, *(name for name in ranking if name != serving)]
        for place, name in enumerate(ranking):
            self._runtime.set_keep_value(self._models[name], keep_value=len(ranking) - place)
        wanted = ranking[: self._room]
        for name in self._tickets.keys() - wanted:
            self._tickets.pop(name).cancel()  # its resident layers stay until room is needed
        models = self._runtime.snapshot().models
        for name in wanted:
            ticket = self._tickets.get(name)
            if (ticket is None or ticket.done) and not models[self._models[name].name].resident:
                self._tickets[name] = self._runtime.prewarm(self._models[name])

    def settle(self) -> None:
        """Wait until all prewarms have ended."""
        for ticket in self._tickets.values():
            with suppress(Busy):  # leases hold the room that it needs
                ticket.wait()


def rank(queue: Sequence[str], past: Sequence[str], tenants: Sequence[str]) -> list[str]:
    """Return the tenants in order of the value of having them in memory, highest first.

    Parameters
    ----------
    queue : sequence of tenants
        The tenants of waiting requests, the next first. They rank first, in this order.
    past : sequence of tenants
        The tenants of all requests so far, including the queue, the oldest first. The other tenants
        rank by how often they have followed the latest tenant (recent times count more), then by
        how recently they were requested.
    tenants : sequence of tenants
        All tenants.
    """
    followed: defaultdict[str, float] = defaultdict(float)
    weight = 1.0
    for before, after in zip(past[-2::-1], past[:0:-1], strict=True):
        if before == past[-1]:
            followed[after] += weight
            weight *= 0.8
    lately = {tenant: age for age, tenant in enumerate(past)}
    waiting = list(dict.fromkeys(queue))
    others = [tenant for tenant in tenants if tenant not in waiting]
    others.sort(key=lambda tenant: (followed[tenant], lately.get(tenant, -1)), reverse=True)
    return waiting + others
