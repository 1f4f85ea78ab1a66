"""One serving thread that answers requests in order of arrival."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .rows import Row
from .workload import Request


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request: greedy tokens, the first `ttft` seconds after its arrival.

    During the first `waited` of these seconds other requests were served.
    """

    request: Request
    tokens: list[int]
    ttft: float
    waited: float
    hit: bool  # the weights were in memory when serving began
    bytes_match: bool | None
    occupancy: float | None


class Clock:
    """Real seconds since its start, without the time in which it was stopped."""

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
    """Answer all requests, one after the other.

    Parameters
    ----------
    row : Row
        The way of serving. It sees only requests that have arrived, never future ones.
    requests : sequence of Request
        The requests in order of time.
    prompts : mapping of prompt to token ids
        The prompts.
    tokens : int
        Maximum number of tokens of an answer.
    end : int
        The token that ends an answer.
    answered : callable
        Called with each answer.

    Notes
    -----
    The row's bytes are checked after each answer, with the clock stopped. Background loads are
    finished before, so that no row can use the stopped time for loading.
    """
    clock = Clock()
    seen = 0

    def arrived(turn: int) -> None:
        """Show the row the queue from request number `turn` on, if requests have arrived."""
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
            seen = 0  # the row must plan again, now with this tenant being served
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
