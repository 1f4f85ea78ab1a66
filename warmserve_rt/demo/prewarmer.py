"""The demo's policy: whom to bring in next, told from the queue and the past alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


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
