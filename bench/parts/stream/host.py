"""A real language model on the host device, loaded from a source of a given bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lib.bound import Bound, ninetieth
from lib.harness import GIB, MIB, Bench
from warmserve_rt import Runtime
from warmserve_rt.engines.torch.gates import gated_parts, own_layers
from warmserve_rt.engines.transformers import load

NAME = "smollm2"
PROMPT_TOKENS = 64
CONTINUED = 8  # tokens
CHUNK = 2 * MIB  # at most 5 ms at the bandwidths here


class Engine:
    """The model in a runtime with limited read bandwidth, and three copies for other loads."""

    def __init__(self, bench: Bench, path: Path, bandwidth: float) -> None:
        self.quick = bench.args.quick
        self.runtime = Runtime(
            arena=bench.size(int(1.25 * GIB), 128 * MIB),
            loaders=1,
            chunk=CHUNK,
            read_bandwidth=int(bandwidth),
        )
        self.module: Any = load(self.runtime, path, name=NAME)
        self.model = self.runtime.model(NAME)
        for copy in range(3):
            self.runtime.register(f"copy {copy}", path)
        self.prompt = torch.arange(100, 100 + PROMPT_TOKENS)[None]
        self.layers = len(self.model.layers)
        self._begun: list[float] = []  # start time of each layer in the timed forward pass

    def first_token(self) -> int:
        with torch.no_grad():
            return int(self.module(self.prompt, logits_to_keep=1).logits[0, -1].argmax())

    def ttft(self, kept: int) -> tuple[float, int]:
        """Return the seconds to the first token, and the token, with `kept` layers resident."""
        self.runtime.evict(self.model, keep=kept)
        begin = perf_counter()
        with self.runtime.lease(self.model, streaming=True):
            token = self.first_token()
        return perf_counter() - begin, token

    def computes(self) -> list[float]:
        """Return the seconds of each layer, with all layers resident and other loads running."""
        with self.runtime.lease(self.model), self.copying():
            self._begun = []
            self.first_token()
            marks = [*self._begun, perf_counter()]
        return [end - begin for begin, end in pairwise(marks)]

    @contextmanager
    def timed_layers(self) -> Iterator[None]:
        """Record the start time of each layer. The first layer starts with the pass itself."""
        begins = {0: self.module}
        for part, layers in gated_parts(self.module, own_layers(self.module, self.model)).items():
            begins.setdefault(layers[0], part)
        hooks = [
            part.register_forward_pre_hook(lambda *_: self._begun.append(perf_counter()))
            for _, part in sorted(begins.items())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Prewarm the copies one after the other; they must take longer than the context."""
        tickets = [self.runtime.prewarm(f"copy {copy}") for copy in range(3)]
        try:
            yield
        finally:
            busy = not tickets[-1].done
            for ticket in tickets:
                ticket.cancel()
            for copy in range(3):
                self.runtime.evict(f"copy {copy}")
            # The passes of a tiny model are too short to be sure.
            assert busy or self.quick, "the copies ended too early"

    def continuation(self, kept: int) -> list[int]:
        self.runtime.evict(self.model, keep=kept)
        with self.runtime.lease(self.model, streaming=True):
            return continued(self.module, self.prompt)


def continued(module: Any, prompt: Any) -> list[int]:
    with torch.no_grad():
        found = module.generate(prompt, do_sample=False, max_new_tokens=CONTINUED)
    return [int(token) for token in found[0, prompt.shape[1] :]]


def ttft_on_the_host(
    bench: Bench, path: Path, ratios: list[float], rounds: int, every: int
) -> None:
    """Measure times to first token on the host device.

    Measures every ratio of load time to compute time, each with numbers of kept layers in steps of
    `every`.
    """
    torch.set_num_threads(1)
    auto: Any = AutoModelForCausalLM
    plain = auto.from_pretrained(path, dtype=torch.float32).eval()
    engine = Engine(bench, path, 8e9)
    wanted = continued(plain, engine.prompt)
    del plain
    alone = _seconds_alone(engine)
    nbytes = [layer.nbytes for layer in engine.model.layers]
    engine.runtime.close()
    bench.row("compute_alone", alone * 1e3, "ms")
    over_bound: list[float] = []
    matches = True
    for ratio in ratios:
        bandwidth = sum(nbytes) / (ratio * alone)
        engine = Engine(bench, path, bandwidth)
        kept = sorted({*range(0, engine.layers, every), engine.layers}, reverse=True)
        taken: dict[int, list[float]] = {k: [] for k in kept}
        computes: list[list[float]] = []
        with engine.runtime.lease(engine.model):
            pass
        with engine.timed_layers():
            for number in range(rounds + 1):
                each = engine.computes()
                if number:
                    computes.append(each)
                for k in kept:
                    seconds, token = engine.ttft(k)
                    matches &= token == wanted[0]
                    if number:
                        taken[k].append(seconds)
        medians = [statistics.median(layer) for layer in zip(*computes, strict=True)]
        bound = Bound(medians, nbytes, bandwidth)
        found = {k: statistics.median(taken[k]) / bound.seconds(k) for k in kept}
        bench.row(f"bandwidth_ratio_{ratio:g}", bandwidth / 1e9, "GB/s")
        bench.row(f"ttft_cold_ratio_{ratio:g}", statistics.median(taken[0]) * 1e3, "ms")
        bench.row(f"ttft_warm_ratio_{ratio:g}", statistics.median(taken[engine.layers]) * 1e3, "ms")
        bench.row(f"ttft_vs_bound_median_ratio_{ratio:g}", statistics.median(found.values()), "")
        worst = max(found, key=lambda k: found[k])
        bench.row(f"ttft_vs_bound_worst_ratio_{ratio:g}", found[worst], f"at k={worst}")
        over_bound += found.values()
        for k in kept:
            matches &= engine.continuation(k) == wanted
        engine.runtime.close()
    bench.target("ttft_vs_bound_p90", ninetieth(over_bound), "", "<=", 1.10)
    bench.target("ttft_vs_bound_max", max(over_bound), "", "<=", 1.25)
    bench.target("tokens_match", int(matches), "", "=", 1)


def foreground_slowdown(bench: Bench, path: Path, ratio: float, rounds: int) -> None:
    """Measure a cold start beside continuous prewarming, relative to one without."""
    torch.set_num_threads(1)
    engine = Engine(bench, path, 8e9)
    alone = _seconds_alone(engine)
    nbytes = engine.model.nbytes
    engine.runtime.close()
    engine = Engine(bench, path, nbytes / (ratio * alone))
    ratios = []
    for number in range(rounds + 1):
        quiet, _ = engine.ttft(0)
        with engine.copying():
            beside, _ = engine.ttft(0)
        if number:
            ratios.append(beside / quiet)
    engine.runtime.close()
    bench.target("foreground_slowdown", statistics.median(ratios), "", "<=", 1.15)


def _seconds_alone(engine: Engine) -> float:
    """Return the median seconds of a forward pass with all layers resident and no other load."""
    with engine.runtime.lease(engine.model):
        taken = []
        for _ in range(7):
            begin = perf_counter()
            engine.first_token()
            taken.append(perf_counter() - begin)
    return statistics.median(taken[2:])
