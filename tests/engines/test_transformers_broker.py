"""Risk: transformers models of two processes that share a broker's arena compute with each other's
weights."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_transformers import PROMPT, plain, save  # noqa: E402

from warmserve_rt import Broker, Runtime  # noqa: E402
from warmserve_rt.engines.transformers import load  # noqa: E402

GRANULE = 2 << 20
STARTS_WITHIN_S = 300  # imports on a busy machine
Tokens = list[list[int]]


def tokens(model: Any) -> Tokens:
    found: Tokens = model.generate(PROMPT, max_new_tokens=8, do_sample=False).tolist()
    return found


def granules_of(path: Path) -> int:
    with Runtime("host", arena="16MiB", max_padding=1.0) as runtime:
        load(runtime, path, name="m")
        return sum(layer.granules for layer in runtime.snapshot().models["m"].layers)


def answerer(runtime: Runtime, path: Path) -> Callable[[], Tokens]:
    model = load(runtime, path)

    def answer() -> Tokens:
        with runtime.lease(model.warmserve_model):
            return tokens(model)

    return answer


def answer_elsewhere(pipe: Any, socket: Path, path: Path) -> None:
    """Answer each message with tokens, in a process of its own, until the pipe ends."""
    torch.set_num_threads(1)
    with Runtime("host", broker=socket, max_padding=1.0) as runtime:
        answer = answerer(runtime, path)
        while pipe.recv():
            pipe.send(answer())


def test_two_processes_take_turns_in_an_arena_that_fits_one(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, "llama", seed) for seed, name in enumerate(("chat", "coder"))]
    wanted = [tokens(plain(path)) for path in paths]
    assert wanted[0] != wanted[1]
    arena = int(1.2 * granules_of(paths[0])) * GRANULE
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with (
        Runtime("host", arena=arena) as owner,
        Broker(owner, tmp_path / "private" / "socket") as broker,
    ):
        other = context.Process(
            target=answer_elsewhere, args=(theirs, broker.path, paths[1]), daemon=True
        )
        other.start()
        try:
            with Runtime("host", broker=broker.path, max_padding=1.0) as runtime:
                here = answerer(runtime, paths[0])
                for turn in range(4):
                    evicted = owner.snapshot().layers_evicted
                    assert here() == wanted[0], f"turn {turn}"
                    ours.send(True)
                    assert ours.poll(STARTS_WITHIN_S)
                    assert ours.recv() == wanted[1], f"turn {turn}"
                    assert owner.snapshot().layers_evicted > evicted
                assert here() == wanted[0]
            ours.send(False)
            other.join(STARTS_WITHIN_S)
            assert other.exitcode == 0
        finally:
            other.kill()
            other.join()
