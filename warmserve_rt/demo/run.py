"""Runs the demo from beginning to end."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers
from transformers import AutoTokenizer

from warmserve_rt._terminal import print_whole

from . import reference, report
from .content import Content, unique_granules
from .lessons import QUESTIONS
from .rows import Row
from .serve import Answer, serve
from .tenants import Progress, make_tenants
from .training import prompt_ids
from .transformers_rows import Mapped, Reload, Transformers
from .workload import Request, arrivals

GRANULE = 2 << 20  # bytes, the runtime's default
TOKENS = 10  # maximum length of an answer
GAP = 1.0  # seconds between requests, on average
Engine: TypeAlias = Literal["transformers", "vllm"]


@dataclass(frozen=True, slots=True)
class Cast:
    """The tenants, the contents of their files, the prompts and the expected answers."""

    tenants: dict[str, Path]
    contents: dict[str, Content]
    tokenizer: Any
    prompts: dict[str, list[int]]
    wanted: dict[tuple[str, str], list[int]]


def run(
    json_path: str | os.PathLike[str] | None = None,
    *,
    requests: int = 20,
    seed: int = 0,
    engine: Engine = "transformers",
    mutate: bool = False,
) -> int:
    """Serve the same requests in several ways and print a table.

    Parameters
    ----------
    json_path : path, optional
        Write the results to this file as JSON.
    requests : int
        Number of requests, at least 2.
    seed : int
        Seed of the requests.
    engine : "transformers" or "vllm"
        The engine.
    mutate : bool
        Swap a granule of two tenants in memory, to check that the demo notices.

    Returns
    -------
    int
        The exit status: 0 if every token and every leased byte is right, else 1.

    Raises
    ------
    ValueError
        Fewer than two requests.
    RuntimeError
        The models cannot be made.
    """
    if requests < 2:
        raise ValueError(f"requests must be at least 2, got {requests}")
    quiet()
    screen = report.Screen()
    screen.console.print(report.INTRODUCTION[engine])
    cast = prepare(screen, engine=engine)
    unique = unique_granules(cast.contents.values())
    arena = unique // 2 * GRANULE
    screen.console.print(
        f"{len(cast.tenants)} models with {unique * GRANULE / 1e6:.0f} MB of unique content; "
        f"an arena of {arena / 1e6:.0f} MB; {requests} requests, seed {seed}\n"
    )
    stream = arrivals([*cast.tenants], QUESTIONS, count=requests, seed=seed, gap=GAP)
    ways = vllm_ways if engine == "vllm" else transformers_ways
    with screen.bars() as bars:
        mutation = random.Random(seed) if mutate else None
        results = [
            _run_row(make, cast, stream, bars) for make in ways(cast, arena, mutation, bars.show)
        ]
    print_whole(screen.console, report.table(results))
    screen.console.print(report.NOTE[engine])
    facts = {
        "engine": engine,
        "models": len(cast.tenants),
        "tenants": [*cast.tenants],
        "arena_bytes": arena,
        "unique_bytes": unique * GRANULE,
        "requests": requests,
        "seed": seed,
    }
    outcome = report.summary(results, **facts)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(outcome, indent=2) + "\n")
    if outcome["tokens_match"] and outcome["bytes_match"]:
        screen.console.print("[bold green]Every token and every leased byte is right.[/]")
        return 0
    screen.console.print("[bold red]FAILED: tokens or bytes differ.[/]")
    return 1


def quiet() -> None:
    """Make torch use one thread and silence transformers."""
    torch.set_num_threads(1)
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def prepare(
    screen: report.Screen, questions: Sequence[str] = QUESTIONS, engine: Engine = "transformers"
) -> Cast:
    """Make missing tenants and return all of them, with questions and expected answers."""
    with screen.bars() as bars:
        tenants = make_tenants(bars.show)
        contents: dict[str, Content] = {}
        for name, path in tenants.items():
            contents[name] = Content(path, GRANULE)
            bars.show("hashing the models' granules", len(contents), len(tenants))
        tokenizer = AutoTokenizer.from_pretrained(next(iter(tenants.values())))
        prompts = {question: prompt_ids(tokenizer, question) for question in questions}
        plain: reference.Plain = reference.PlainTransformers()
        if engine == "vllm":
            from .vllm_rows import PlainVllm

            plain = PlainVllm()
        wanted = reference.expected(tenants, contents, prompts, TOKENS, bars.show, plain)
    samples: dict[str, Any] = {
        name: tokenizer.decode(wanted[name, questions[0]], skip_special_tokens=True)
        for name in tenants
    }
    screen.console.print(report.samples(questions[0], samples))
    return Cast(tenants, contents, tokenizer, prompts, wanted)


def transformers_ways(
    cast: Cast, arena: int, mutation: random.Random | None, progress: Progress
) -> Iterator[Callable[[], Row]]:
    """Yield a function that makes each row. Call it after the previous row was closed."""
    warm_up(cast)
    yield lambda: Reload(cast.tenants)
    yield lambda: Mapped(cast.tenants)
    yield lambda: Transformers(cast.tenants, cast.contents, arena, mutation=mutation)
    yield lambda: Transformers(cast.tenants, cast.contents, arena, prewarm=True)


def vllm_ways(
    cast: Cast, arena: int, mutation: random.Random | None, progress: Progress
) -> Iterator[Callable[[], Row]]:
    """Like :func:`transformers_ways`, for vLLM."""
    from .vllm_rows import Restarted, Vllm

    cache = next(iter(cast.tenants.values())).parent / "vllm"
    yield lambda: Restarted(cast.tenants, cast.contents)
    yield lambda: Vllm(cast.tenants, arena, cache, progress, mutation=mutation)
    yield lambda: Vllm(cast.tenants, arena, cache, progress, prewarm=True)


def warm_up(cast: Cast) -> None:
    """Let torch prepare its kernels, so that no row pays for it."""
    with Mapped(cast.tenants).serving(next(iter(cast.tenants))) as say:
        for prompt in cast.prompts.values():
            for _ in say(prompt, 2, -1):
                pass


def _run_row(
    make: Callable[[], Row], cast: Cast, stream: Sequence[Request], bars: report.Bars
) -> report.Result:
    with closing(make()) as row:
        return _served(row, cast, stream, bars)


def _served(row: Row, cast: Cast, stream: Sequence[Request], bars: report.Bars) -> report.Result:
    result = report.Result(row.name, row.title)
    bars.show(row.title, 0, len(stream))

    def answered(answer: Answer) -> None:
        request = answer.request
        result.answers.append(answer)
        result.wrong += answer.tokens != cast.wanted[request.tenant, request.prompt]
        hits = sum(a.hit for a in result.answers)
        detail = f"{request.tenant:9} {answer.ttft * 1e3:5.0f} ms  {hits} hits"
        bars.show(row.title, len(result.answers), len(stream), detail)

    end = cast.tokenizer.eos_token_id
    serve(row, stream, cast.prompts, tokens=TOKENS, end=end, answered=answered)
    result.bytes_moved = row.bytes_moved()
    return result
