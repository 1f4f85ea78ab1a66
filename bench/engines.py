"""What do serving engines gain and lose when their weights are in an arena?

The bench compares the installed vLLM, with weights in an arena, with the same vLLM and its own
loader, on the CPU with one thread and a real language model in float32. It then measures
transformers (engines_transformers.py, which can also run alone). It needs the environment that
`.ci/engine_tests` makes.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from lib.harness import Bench, interleaved, not_run, ratio, scratch, seconds

if not find_spec("vllm"):
    not_run("vLLM is missing; .ci/engine_tests makes an environment with it")

# isort: split
import psutil

from engines_transformers import measure as measure_transformers
from load import huge_pages, read, reclaim
from parts.engines.vllm import Engine, close_arena, engine, write_other  # before vLLM

# isort: split
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.worker.cpu_worker import CPUWorker

from warmserve_rt.demo.tenants import make_tenants
from warmserve_rt.engines.vllm.worker import Worker

GRANULE = 2 << 20


class Loads:
    """Engine starts, timed inside load_model, with the files in the page cache."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache = model, cache

    def plain(self) -> float:
        with engine(self.model) as made:
            return made.load_s

    def cached(self) -> float:
        """Time a start with a new arena and the weights in the disk cache."""
        close_arena()
        with engine(self.model, self.cache) as made:
            return made.load_s

    def resident(self) -> float:
        """Time a start beside an engine that has the same weights in the arena."""
        with engine(self.model, self.cache) as first, engine(self.model, self.cache) as second:
            assert first.worker._weights[0].model is second.worker._weights[0].model
            return second.load_s

    def first_token(self, *, gated: bool) -> float:
        """Time load_model plus the first token, without the engine's other setup."""
        close_arena()
        with engine(self.model, self.cache, gated=gated) as made:
            return made.load_s + seconds(lambda: made.tokens(1, 1))


def bench_loads(bench: Bench, loads: Loads) -> None:
    with engine(loads.model, loads.cache) as made:
        bench.row("first_load_s", made.load_s, "s")
    taken = interleaved(
        {"plain": loads.plain, "cached": loads.cached, "resident": loads.resident},
        bench.args.rounds,
    )
    for name, samples in taken.items():
        bench.row(f"{name}_load_s", statistics.median(samples), "s")
    bench.target(
        "resident_load_ratio", ratio(taken["resident"], taken["plain"]), "times", "<=", 0.1
    )
    bench.target("cached_load_ratio", ratio(taken["cached"], taken["plain"]), "times", "<=", 0.35)
    starts = interleaved(
        {
            "gated": lambda: loads.first_token(gated=True),
            "whole": lambda: loads.first_token(gated=False),
        },
        bench.args.rounds,
    )
    for name, samples in starts.items():
        bench.row(f"{name}_load_and_first_token_s", statistics.median(samples), "s")


def bench_decode(bench: Bench, plain: Engine, ours: Engine) -> None:
    parameters = {p.data_ptr(): p for p in ours.worker.get_model().parameters()}
    views = {t.data_ptr() for t in ours.worker._weights[0].model.tensors().values()}
    bound = sum(p.nbytes for at, p in parameters.items() if at in views)
    share = bound / sum(p.nbytes for p in parameters.values())
    bench.target("bound_bytes_share", share, "", ">=", 0.99)
    for streams in (1, 6):
        taken = interleaved(
            {
                "plain": partial(seconds, partial(plain.tokens, streams, 32)),
                "ours": partial(seconds, partial(ours.tokens, streams, 32)),
            },
            2 * bench.args.rounds,  # each takes seconds, so other load may disturb it
        )
        speed = 32 * streams / statistics.median(taken["ours"])
        bench.row(f"decode_tokens_per_s_{streams}", speed, "1/s")
        against = ratio(taken["plain"], taken["ours"])
        if streams == 1:
            bench.target("decode_vs_plain_1", against, "times", ">=", 0.95)
        else:
            bench.row(f"decode_vs_plain_{streams}", against, "times")


def bench_wake(bench: Bench, ours: Engine, plain_load_s: float) -> None:
    (weights,) = ours.worker._weights
    path = weights._entry.weights
    loaders = max(1, min(8, len(os.sched_getaffinity(0)) - 1))  # the runtime's default

    def wake() -> float:
        ours.llm.sleep(1)
        return seconds(ours.llm.wake_up)

    def limit() -> float:
        reclaim()
        with huge_pages(path.stat().st_size) as memory:
            return seconds(lambda: read(path, memory, loaders))

    taken = interleaved({"wake": wake, "limit": limit}, 2 * bench.args.rounds)
    bench.row("wake_s", statistics.median(taken["wake"]), "s")
    bench.row("vllm_reload_s", plain_load_s, "s")
    bench.target("wake_vs_limit", ratio(taken["wake"], taken["limit"]), "times", "<=", 1.3)


def bench_step(bench: Bench, ours: Engine) -> None:
    """Measure what our worker adds to a step, with a model runner that does nothing."""
    worker, steps = ours.worker, 5000
    runner, scheduled = worker.model_runner, SimpleNamespace(total_num_scheduled_tokens=1)
    real = runner.execute_model, runner.sample_tokens
    runner.execute_model, runner.sample_tokens = (lambda *_: None), (lambda *_: "output")
    worker.annotate_profile = lambda _: ExitStack()

    def step(kind: Any) -> float:
        begin = perf_counter()
        for _ in range(steps):
            kind.execute_model(worker, scheduled)
            kind.sample_tokens(worker, None)
        return 1e6 * (perf_counter() - begin) / steps

    try:
        taken = interleaved(
            {"ours": lambda: step(Worker), "plain": lambda: step(CPUWorker)}, bench.args.rounds
        )
    finally:
        runner.execute_model, runner.sample_tokens = real
        del worker.annotate_profile
    added = [ours - plain for ours, plain in zip(taken["ours"], taken["plain"], strict=True)]
    bench.target("lease_us_per_step", statistics.median(added), "us", "<=", 25)


class Answers:
    """Compares our tokens with those of plain vLLM: 4 prompts, 48 tokens each."""

    def __init__(self, wanted: dict[Path, list[list[int]]]) -> None:
        self.wanted = wanted
        self.compared = self.equal = 0

    def check(self, model: Path, made: Engine) -> None:
        for ours, plain in zip(made.tokens(), self.wanted[model], strict=True):
            self.compared += len(plain)
            self.equal += sum(a == b for a, b in zip(ours, plain, strict=True))


def plain_answers(models: list[Path]) -> dict[Path, list[list[int]]]:
    found = {}
    for model in models:
        with engine(model) as made:
            found[model] = made.tokens()
    return found


def check_alternation(answers: Answers, models: list[Path], cache: Path) -> float:
    """Alternate two engines in an arena of 1.2 models; return arena size over model size."""
    close_arena()
    with engine(models[0], cache) as alone:
        (weights,) = alone.worker._weights
        layers = weights.runtime.snapshot().models[weights.model.name].layers
        granules: int = sum(layer.granules for layer in layers)
    close_arena()
    arena = int(1.2 * granules) * GRANULE
    with (
        engine(models[0], cache, arena=arena) as first,
        engine(models[1], cache, arena=arena) as second,
    ):
        for _ in range(10):
            answers.check(models[0], first)
            answers.check(models[1], second)
    close_arena()
    return arena / (granules * GRANULE)


def check_gated(answers: Answers, model: Path, cache: Path) -> None:
    close_arena()
    with engine(model, cache, gated=True) as made:
        answers.check(model, made)
    close_arena()


def check_killed(answers: Answers, model: Path, cache: Path) -> None:
    """Kill an engine's worker process, then check an engine that replaces it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    try:
        with engine(model, cache) as made:
            made.tokens(1, 1)
            children = psutil.Process().children(recursive=True)
            for child in children:
                if not child.children() and "resource_tracker" not in " ".join(child.cmdline()):
                    os.kill(child.pid, signal.SIGKILL)
            died = False
            for _ in range(1000):
                try:
                    made.tokens(1, 1)
                except EngineDeadError:
                    died = True
                    break
            assert died, "the worker was not killed"
        with engine(model, cache) as again:
            answers.check(model, again)
    finally:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: SmolLM2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each kind")
    bench = Bench.start("engines", parser, rounds=1)
    model: Path = bench.args.model or next(iter(make_tenants(lambda *_: None, count=1).values()))
    with scratch() as directory:
        cache = directory / "cache"
        other = write_other(model, directory / "other")
        bench_loads(bench, Loads(model, cache))
        close_arena()
        answers = Answers(plain_answers([model, other]))
        with engine(model) as plain, engine(model, cache) as ours:
            answers.check(model, ours)  # bound
            bench_decode(bench, plain, ours)
            bench_wake(bench, ours, plain.load_s)
            answers.check(model, ours)  # woken
            bench_step(bench, ours)
        bench.row("alternation_arena", check_alternation(answers, [model, other], cache), "times")
        check_gated(answers, model, cache)
        check_killed(answers, model, cache)
        bench.row("tokens_compared", answers.compared, "tokens")
        bench.target("tokens_match", answers.equal / answers.compared, "", "=", 1)
    measure_transformers(bench, model, bench.args.rounds)
    bench.finish()


if __name__ == "__main__":
    main()
