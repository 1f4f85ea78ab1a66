"""The wait of a request that needs a switch: two models of a configuration, an arena for one.

A switch is the swap, the lease and the first token of the absent model. It is compared with plain
transformers: `from_pretrained` and the first token. The files are in the page cache in both cases.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from lib.harness import MIB, Bench, interleaved, ratio
from parts.engines.devices import Place, arena_of
from warmserve_rt.engines.transformers import load

TOKENS = 8


def measure_switch(bench: Bench, place: Place, models: list[Path], rounds: int) -> None:
    wanted = [place.say(place.plain(model), TOKENS) for model in models]
    assert not torch.equal(*wanted), "tokens would not tell the models apart"
    with place.runtime(64 * MIB) as sized:
        arena = arena_of(load(sized, models[0]))
    with place.runtime(arena) as runtime:
        modules = [load(runtime, model, name=f"model{n}") for n, model in enumerate(models)]
        now, switches, equal = 0, 0, 0
        runtime.prewarm("model0").wait()

        def first_token(streaming: bool = False) -> None:
            with runtime.lease(f"model{now}", streaming=streaming):
                place.say(modules[now], 1)
                place.done()

        def resident() -> float:
            return place.seconds(first_token)

        def switch(streaming: bool) -> float:
            nonlocal now, switches, equal
            gone, now = now, 1 - now

            def work() -> None:
                runtime.swap(evict=f"model{gone}", load=f"model{now}")
                first_token(streaming)

            taken = place.seconds(work)
            with runtime.lease(f"model{now}"):
                equal += torch.equal(place.say(modules[now], TOKENS), wanted[now])
            switches += 1
            return taken

        def plain() -> float:
            def work() -> Any:
                module = place.plain(models[now])
                place.say(module, 1)
                return module

            return place.seconds(work)

        runs = {
            "switch": lambda: switch(streaming=False),
            "streaming_switch": lambda: switch(streaming=True),
            "resident_first_token": resident,
            "plain_first_token": plain,
        }
        taken = interleaved(runs, rounds)
    for name, samples in taken.items():
        bench.row(f"{name}_ms", 1e3 * statistics.median(samples), "ms")
    bench.row("switch_vs_plain", ratio(taken["switch"], taken["plain_first_token"]), "times")
    bench.target("switched_tokens_are_transformers", equal / switches, "", "=", 1)
