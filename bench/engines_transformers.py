"""What does a transformers model in the arena cost, compared with plain transformers?

Binding: `load()`, which reads no weights, takes turns with `from_pretrained` of the same directory,
which is in the page cache. On the host `from_pretrained` maps the file and does not read it either;
on CUDA it copies the weights to the device. The bench times the first model of a configuration and
later ones, whose module is not built again.

Gates: the bench measures what the hooks add to a forward pass. It removes the computation from the
hooked parts, because the hooks' cost is invisible beside milliseconds of computing. It measures
passes after the leased layers have arrived, when only the checks at the entries remain, and the
first pass under a lease, when every part waits for its own layers.

Switches: see parts/engines/switch.py. torch uses one thread throughout.

    python bench/engines_transformers.py [--device cuda:0] [--made 1b] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from lib.harness import MIB, Bench, interleaved, ratio, scratch
from parts.engines.devices import Place
from parts.engines.random_models import SIZES, make, make_other
from parts.engines.switch import measure_switch
from warmserve_rt import Runtime, StaleView
from warmserve_rt.demo.tenants import make_tenants
from warmserve_rt.engines import transformers as transformers_engine
from warmserve_rt.engines.transformers import load
from warmserve_rt.engines.transformers.blueprints import Blueprints

TOKENS = 8
Part = Callable[[], None]


def measure(
    bench: Bench,
    model: Path,
    rounds: int,
    other: Path | None = None,
    run: Callable[[Part], None] = lambda part: part(),
) -> None:
    """Measure binding, gates, tokens and switches of a causal model.

    Parameters
    ----------
    bench : Bench
        Takes the results.
    model : Path
        The model's directory.
    rounds : int
        Rounds of each measurement.
    other : Path, optional
        A model of the same configuration to switch to. Default: a made one.
    run : callable
        Runs each part; it may catch exceptions.
    """
    torch.set_num_threads(1)
    progress: Any = logging
    progress.disable_progress_bar()
    place = Place(bench.args.device)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))

    def binding() -> None:
        with place.runtime(size + size // 8 + 64 * MIB) as runtime:
            measure_binding(bench, place, runtime, model, rounds)

    def gates() -> None:
        with place.runtime(size + size // 8 + 64 * MIB) as runtime:
            module = load(runtime, model, name="chat")
            measure_gates(bench, place, runtime, module, bench.size(1000, 10))

    def tokens() -> None:
        with place.runtime(size + size // 8 + 64 * MIB) as runtime:
            measure_tokens(bench, place, runtime, model, rounds)

    def switch() -> None:
        with scratch() as folder:
            second = other or make_other(model, folder / "other")
            measure_switch(bench, place, [model, second], rounds)

    for part in (binding, gates, tokens, switch):
        run(part)


def measure_binding(bench: Bench, place: Place, runtime: Runtime, model: Path, rounds: int) -> None:
    def bound(*, first: bool = False, lease: bool = False) -> float:
        if first:
            transformers_engine._blueprints = Blueprints()

        def work() -> Any:
            module: Any = load(runtime, model, name="bound")
            if lease:
                with runtime.lease("bound"):
                    pass
            return module

        taken = place.seconds(work)
        gc.collect()  # module and gates form a cycle that keeps the model's addresses
        runtime.unregister("bound")
        return taken

    def pretrained(read: bool) -> float:
        def work() -> Any:
            module: Any = place.plain(model)
            if read:  # one element of every page
                for parameter in module.parameters():
                    parameter.data.view(-1)[:: 4096 // parameter.element_size()].sum()
            return module

        return place.seconds(work)

    bound(), bound()  # from the third on, the configuration's module is cached
    taken = interleaved(
        {
            "bind": bound,
            "bind_and_load": lambda: bound(lease=True),
            "from_pretrained": lambda: pretrained(False),
            "from_pretrained_and_read": lambda: pretrained(True),
        },
        rounds,
    )
    for name, samples in taken.items():
        bench.row(f"{name}_s", statistics.median(samples), "s")
    theirs = taken["from_pretrained"]
    bench.target("bind_vs_from_pretrained", ratio(taken["bind"], theirs), "times", "<=", 0.3)
    firsts = interleaved(
        {"first": lambda: bound(first=True), "theirs": lambda: pretrained(False)}, rounds
    )
    of_first = ratio(firsts["first"], firsts["theirs"])
    bench.row("first_bind_vs_from_pretrained", of_first, "times")
    ready = ratio(taken["bind_and_load"], taken["from_pretrained_and_read"])
    bench.row("weights_there_vs_from_pretrained", ready, "times")


def measure_gates(bench: Bench, place: Place, runtime: Runtime, module: Any, passes: int) -> None:
    """Measure what the hooks add to a pass, by `passes` passes with and without them in turns."""
    runtime.prewarm("chat").wait()
    with runtime.lease("chat", layers=1):
        try:
            module(place.prompt)
        except StaleView:
            waiting = [part for part in module.modules() if part._forward_pre_hooks]
        else:
            raise AssertionError("the pass did not need the second layer")
        finally:
            place.done()

    def renew() -> None:
        with runtime.lease("chat", layers=1):
            pass

    with ExitStack() as stack:
        for part in waiting:
            stack.enter_context(computing_nothing(part))
        with runtime.lease("chat"):
            bench.target("gate_us_per_token", hooks_us(waiting, passes), "us", "<=", 5)
        # Under a lease without the last layer. Parts that compute with that layer are left out.
        with runtime.lease("chat", layers=range(len(module.warmserve_model.layers) - 1)):
            parts = [part for part in waiting if has_layers(part)]
            bench.row("gate_us_per_token_of_a_part", hooks_us(parts, passes), "us")
            bench.row("gate_us_of_a_first_pass", hooks_us(parts, passes, renew), "us")


def has_layers(part: nn.Module) -> bool:
    try:
        part()
    except StaleView:
        return False
    return True


def hooks_us(
    parts: list[nn.Module], passes: int, prepare: Callable[[], None] = lambda: None
) -> float:
    """Return the microseconds that hooks add to the calls of these parts, which compute nothing.

    The result is the median over the passes; ``prepare`` runs before each.
    """
    hooks = [part._forward_pre_hooks for part in parts]
    none: list[Any] = [OrderedDict() for _ in parts]

    def timed(these: list[Any]) -> float:
        prepare()
        for part, its in zip(parts, these, strict=True):
            part._forward_pre_hooks = its
        begin = perf_counter()
        for part in parts:
            part()
        return perf_counter() - begin

    taken = interleaved({"without": lambda: timed(none), "with": lambda: timed(hooks)}, passes)
    difference = [w - wo for w, wo in zip(taken["with"], taken["without"], strict=True)]
    return 1e6 * statistics.median(difference)


@contextmanager
def computing_nothing(part: Any) -> Iterator[None]:
    part.forward = lambda: None
    try:
        yield
    finally:
        del part.forward


def measure_tokens(bench: Bench, place: Place, runtime: Runtime, model: Path, rounds: int) -> None:
    """Time tokens against plain transformers with weights already read, and compare the tokens."""
    module = load(runtime, model, name="chat")
    plain = place.plain(model)
    said: dict[str, Any] = {}

    def ours() -> None:
        with runtime.lease("chat"):
            said["ours"] = place.say(module, TOKENS)
            place.done()

    def theirs() -> None:
        said["theirs"] = place.say(plain, TOKENS)

    runs = {"ours": lambda: place.seconds(ours), "plain": lambda: place.seconds(theirs)}
    taken = interleaved(runs, rounds)
    bench.row("token_ms", 1e3 * statistics.median(taken["ours"]) / TOKENS, "ms")
    bench.row("token_vs_plain", ratio(taken["ours"], taken["plain"]), "times")
    same = int(torch.equal(said["ours"], said["theirs"]))
    bench.target("tokens_are_transformers", same, "", "=", 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="a directory (default: the demo's SmolLM2)")
    which.add_argument("--made", choices=SIZES, help="two random Llamas of this size instead")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each kind")
    bench = Bench.start("engines-transformers", parser, made="tiny", rounds=1)
    failed = 0

    def run(part: Part) -> None:
        nonlocal failed
        try:
            part()
        except Exception:
            traceback.print_exc()
            failed += 1

    with ExitStack() as stack:
        other, model = None, bench.args.model
        if bench.args.made:
            folder, device = stack.enter_context(scratch()), Place(bench.args.device).device
            model, other = (
                make(folder / str(seed), bench.args.made, device, seed) for seed in (1, 2)
            )
        model = model or next(iter(make_tenants(lambda *_: None, count=1).values()))
        measure(bench, model, bench.args.rounds, other, run)
    bench.finish()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
