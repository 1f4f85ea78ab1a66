"""A seeded stream of requests to the tenants, with bursts and habits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """A request: `prompt` arrives for `tenant`, `time` seconds after the start."""

    time: float
    tenant: str
    prompt: str


def arrivals(
    tenants: Sequence[str], prompts: Sequence[str], *, count: int, seed: int, gap: float
) -> list[Request]:
    """Return requests in order of time.

    Requests arrive in bursts of one to three, a fraction of a second apart within a burst, so that
    some wait while another is served: the queue shows the next tenant. A tenant is mostly followed
    by itself or by one particular other tenant, so the past also predicts the next tenant, though
    never with certainty.

    Parameters
    ----------
    tenants, prompts
        The tenants and prompts to choose from.
    count : int
        Number of requests.
    seed : int
        Seed of all choices.
    gap : float
        Average time between requests in seconds.
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
        # The quiet time keeps the average, and does not end before the burst.
        time = max(burst, time + size * gap * random_.uniform(0.6, 1.4))
    return requests
