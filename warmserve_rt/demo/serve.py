"""One serving thread: takes the requests as they arrive and answers them in that order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .rows import Row
from .workload import Request


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got: greedy tokens, the first of them `ttft` seconds after its arrival.

    For `waited` of these seconds others were served.
    """

    request: Request
    tokens: list[int]
    ttft: float
    waited: float
    hit: bool  # the weights were in memory when its turn came
    bytes_match: bool | None
    occupancy: float | None


class Clock:
    """Real seconds since its start, without those in which it was stopped."""

    def __init__(self) -> None:
        self._zero = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._zero

    @contextmanager
    def stopped(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self._zero += time.monotonic() - before


def serve(
    row: Row,
    requests: Sequence[Request],
    prompts: Mapping[str, list[int]],
    *,
    tokens: int,
    end: int,
    answered: Callable[[Answer], None],
) -> None:
    """Answer all requests, `tokens` tokens each or up to the token `end`, one after the other.

    `row` is shown the requests that have arrived, never those to come. Its bytes are checked after
    each answer, while the clock stands and, for nobody to gain time by that, nothing is moving.
    """
    clock = Clock()
    seen = 0

    def arrived(turn: int) -> None:
        """Show the row the queue behind request number `turn`, if it has changed."""
        nonlocal seen
        count = sum(request.time <= clock.now() for request in requests)
        if count > seen:
            seen = count
            past = [request.tenant for request in requests[:count]]
            row.look_ahead(past[turn:], past)

    for turn, request in enumerate(requests):
        time.sleep(max(0.0, request.time - clock.now()))
        waited = clock.now() - request.time
        hit = row.ready(request.tenant)
        with row.serving(request.tenant) as say:
            seen = 0  # the row has not been asked yet what it would do beside this request
            arrived(turn + 1)
            answer: list[int] = []
            ttft = 0.0
            for token in say(prompts[request.prompt], tokens, end):
                ttft = ttft or clock.now() - request.time
                answer.append(token)
                arrived(turn + 1)
            row.settle()
            with clock.stopped():
                matches, occupancy = row.bytes_match(request.tenant), row.occupancy()
        seen = 0
        arrived(turn + 1)
        answered(Answer(request, answer, ttft, waited, hit, matches, occupancy))
