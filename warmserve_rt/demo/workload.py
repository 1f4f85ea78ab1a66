"""Who asks what when: a seeded stream of requests over the tenants, in bursts and by habit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """`prompt` comes for `tenant`, `time` seconds after the start."""

    time: float
    tenant: str
    prompt: str


def arrivals(
    tenants: Sequence[str], prompts: Sequence[str], *, count: int, seed: int, gap: float
) -> list[Request]:
    """`count` requests in order of time, on average `gap` seconds apart.

    They come in bursts of one to three, a burst's a fraction of a second apart, so that some wait
    while another is served: the queue tells what is next. And tenants follow one another by
    habit: each mostly stays or is followed by the same other one, so that the past tells, too,
    though never surely.
    """
    random_ = random.Random(seed)
    cycle = random_.sample(tenants, len(tenants))
    follower = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    tenant = random_.choice(cycle)
    requests: list[Request] = []
    time = 0.0
    while len(requests) < count:
        size = min(random_.choice((1, 2, 3)), count - len(requests))
        burst = time
        for _ in range(size):
            requests.append(Request(burst, tenant, random_.choice(prompts)))
            burst += random_.expovariate(1 / (0.25 * gap))
            draw = random_.random()
            if draw < 0.6:
                tenant = follower[tenant]
            elif draw > 0.85:
                tenant = random_.choice(cycle)
        # A quiet time that keeps the average, and never ends before the burst does.
        time = max(burst, time + size * gap * random_.uniform(0.6, 1.4))
    return requests
