"""The demo's policy: whom to bring in next, told from the queue and the past alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress

from warmserve_rt import Busy, Model, Runtime, Ticket


class Prewarmer:
    """Brings in the tenants that are most worth having, as many as there is room for."""

    def __init__(self, runtime: Runtime, models: Mapping[str, Model]) -> None:
        self._runtime, self._models = runtime, models
        snapshot = runtime.snapshot()
        layers = [snapshot.models[model.name].layers for model in models.values()]
        self._room = snapshot.granules // max(sum(each.granules for each in of) for of in layers)
        self._tickets: dict[str, Ticket] = {}

    def look_ahead(self, serving: str, queue: Sequence[str], past: Sequence[str]) -> None:
        """``queue`` and ``past`` as of :func:`rank`. Who is served, if anybody, has room before all
        others."""
        ranking = rank(queue, past, [*self._models])
        if serving:
            ranking = [serving, *(name for name in ranking if name != serving)]
        for place, name in enumerate(ranking):
            self._runtime.stamp(self._models[name], keep_value=len(ranking) - place)
        wanted = ranking[: self._room]
        for name in self._tickets.keys() - wanted:
            self._tickets.pop(name).cancel()  # what has arrived of it stays until it is in the way
        models = self._runtime.snapshot().models
        for name in wanted:
            ticket = self._tickets.get(name)
            if (ticket is None or ticket.done) and not models[self._models[name].name].resident:
                self._tickets[name] = self._runtime.prewarm(self._models[name])

    def settle(self) -> None:
        """Wait until nothing moves."""
        for ticket in self._tickets.values():
            with suppress(Busy):  # a lease came first
                ticket.wait()


def rank(queue: Sequence[str], past: Sequence[str], tenants: Sequence[str]) -> list[str]:
    """The tenants, the one most worth having in memory first.

    `queue` are the tenants of the requests that wait, the next first: they rank first and in that
    order. `past` are the tenants of all requests so far, the queue's included, the oldest first:
    the others rank by how often they have followed the last, a recent time counting for more, and
    then by how lately they were asked for.
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
