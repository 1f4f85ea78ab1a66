"""How does a server of several models handle clients that hang up at random moments?

Five small random models share an arena for two. Each client requests tokens of one model, by
`stream_tokens` or by a lease around a `generate` in a thread, and hangs up at a random moment:
while it waits, between two tokens, in a pass, or after the last. The bench compares every token
with plain transformers. The server is a separate process, so that a crash is counted and does not
end the bench.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.harness import Bench
from warmserve_rt import Runtime, StaleView
from warmserve_rt.engines.transformers import load, stream_tokens

MODELS, ROOM, TOKENS = 5, 2, 12
PROMPT = torch.tensor([[7, 3, 55, 20, 9, 41, 6, 30, 12]])
LAYERS = 5  # of each model: embeddings, three blocks, the rest; each takes one granule


def make_models(folder: Path) -> dict[str, list[int]]:
    """Save random models and return the tokens that plain transformers generates with each."""
    wanted = {}
    for seed in range(MODELS):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "llama",
            vocab_size=96,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            pad_token_id=0,
            eos_token_id=None,
        )
        auto: Any = AutoModelForCausalLM
        module = auto.from_config(config).eval()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        module.save_pretrained(folder / str(seed))
        made = module.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False)
        wanted[str(seed)] = made[0, PROMPT.shape[1] :].tolist()
    return wanted


class Server:
    def __init__(self, runtime: Runtime, folder: Path, wanted: dict[str, list[int]]) -> None:
        self.runtime = runtime
        self.wanted = wanted
        self.modules: dict[str, Any] = {
            name: load(runtime, folder / name, name=name) for name in wanted
        }
        self.counts = dict.fromkeys(("hung_up", "served", "tokens", "wrong_tokens", "stale"), 0)

    async def request(self, name: str, streamed: bool) -> None:
        options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
        module, wanted = self.modules[name], self.wanted[name]
        if streamed:
            arrived = 0
            async for token in stream_tokens(self.runtime, module, PROMPT, **options):
                self._compare([token], wanted[arrived : arrived + 1])
                arrived += 1
        else:
            async with self.runtime.lease(name):
                made = await asyncio.to_thread(self._generate, module, options)
            self._compare(made, wanted)
        self.counts["served"] += 1

    def _generate(self, module: Any, options: dict[str, Any]) -> list[int]:
        try:
            made = module.generate(PROMPT, **options)
        except StaleView:  # the client hung up, and its lease ended
            self.counts["stale"] += 1
            return []
        tokens: list[int] = made[0, PROMPT.shape[1] :].tolist()
        # Compared even if the client has hung up.
        self._compare(tokens, self.wanted[module.warmserve_model.name])
        return tokens

    def _compare(self, made: list[int], wanted: list[int]) -> None:
        self.counts["tokens"] += len(made)
        self.counts["wrong_tokens"] += made != wanted

    async def client(self, choice: random.Random, longest_s: float) -> None:
        streamed = choice.random() < 0.5
        task = asyncio.create_task(self.request(str(choice.randrange(MODELS)), streamed))
        await asyncio.wait([task], timeout=choice.uniform(0, longest_s))
        if task.cancel():
            self.counts["hung_up"] += 1
        with suppress(asyncio.CancelledError):
            await task

    async def serve(self, hang_ups: int, at_once: int, seed: int) -> None:
        choice = random.Random(seed)
        begin = perf_counter()
        for _ in range(8):  # one after the other, so that each waits for a load
            await self.request(str(choice.randrange(MODELS)), True)
        longest_s = at_once * (perf_counter() - begin) / 8

        async def worker() -> None:
            while self.counts["hung_up"] < hang_ups:
                await self.client(choice, longest_s)

        await asyncio.gather(*(worker() for _ in range(at_once)))


def serve(folder: Path, hang_ups: int, at_once: int, seed: int) -> dict[str, int]:
    torch.set_num_threads(1)
    wanted = json.loads((folder / "wanted.json").read_text())
    with Runtime(arena=f"{2 * LAYERS * ROOM}MiB", staging="16MiB") as runtime:
        server = Server(runtime, folder, wanted)
        asyncio.run(server.serve(hang_ups, at_once, seed))
        left = runtime.snapshot().leases
        runtime.check_invariants()
        for name in wanted:
            runtime.evict(name, wait="nothing")  # raises Busy if a pass is left
    return {**server.counts, "leases_left": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hang-ups", type=int, default=1000, help="clients that hang up")
    parser.add_argument("--at-once", type=int, default=6, help="concurrent clients")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # the server's own process
    bench = Bench.start("hangup", parser, hang_ups=6)
    args = bench.args
    if args.serve:
        print(json.dumps(serve(args.serve, args.hang_ups, args.at_once, args.seed)))
        return
    with tempfile.TemporaryDirectory(prefix="warmserve-bench-") as directory:
        folder = Path(directory)
        (folder / "wanted.json").write_text(json.dumps(make_models(folder)))
        numbers = ("--hang-ups", args.hang_ups, "--at-once", args.at_once, "--seed", args.seed)
        begin = perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", __file__, "--serve", directory]
            + [str(each) for each in numbers],
            capture_output=True,
            text=True,
        )
        seconds = perf_counter() - begin
    counts = json.loads(done.stdout) if done.returncode == 0 else {}
    if not counts:
        print(done.stderr, file=sys.stderr)
    bench.target("crashes", int(not counts), "", "=", 0)
    for name in ("wrong_tokens", "leases_left"):
        bench.target(name, counts.get(name, -1), "", "=", 0)
    for name in ("hung_up", "served", "stale", "tokens"):
        bench.row(name, counts.get(name, -1), "")
    bench.row("seconds", seconds, "s")
    bench.finish()


if __name__ == "__main__":
    main()
