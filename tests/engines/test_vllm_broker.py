"""Risk: vLLM's workers that share a broker's arena load twice, or take weights from each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from warmserve_rt import Broker, Busy, OutOfDeviceMemory, Runtime, WarmServeError  # noqa: E402
from warmserve_rt.engines.torch.state import State  # noqa: E402
from warmserve_rt.engines.vllm import arenas  # noqa: E402
from warmserve_rt.engines.vllm.broker_arena import BrokerArena  # noqa: E402
from warmserve_rt.engines.vllm.cache import Cache, Key, discard  # noqa: E402

LAYERS = 3  # of one granule each, in each model


@pytest.fixture
def owner() -> Iterator[Runtime]:
    with Runtime("host", arena="8MiB") as runtime:  # four granules: room for one model
        yield runtime


@pytest.fixture
def socket(owner: Runtime, tmp_path: Path) -> Iterator[Path]:
    with Broker(owner, tmp_path / "broker" / "socket") as broker:
        yield broker.path
        if found := arenas.find(broker.path):
            found.runtime.close()


def state_of(model: str) -> State:
    made = torch.Generator().manual_seed(len(model))
    return State(
        parameters={
            f"model.layers.{i}.weight": torch.randn(256, 256, generator=made) for i in range(LAYERS)
        }
    )


def entry_of(root: Path, model: str = "chat") -> Any:
    return Cache(root / "cache").write(Key(model, {"model": model}, {}), state_of(model))


def resident(owner: Runtime, model: Any) -> bool:
    return bool(owner.snapshot().models[model.name].resident)


def assert_right(weights: Any, model: str = "chat") -> None:
    with weights.runtime.lease(weights.model) as lease:
        wanted = state_of(model).parameters
        assert lease.tensors.keys() == wanted.keys()
        assert all(torch.equal(lease.tensors[name], wanted[name]) for name in wanted)


def test_engines_of_a_process_share_a_connection_until_the_last_one_ends(
    socket: Path, tmp_path: Path
) -> None:
    entry = entry_of(tmp_path)
    arena = arenas.attach(socket)
    first, second = arenas.attach(socket).add(entry), arena.add(entry)
    assert first.arena is second.arena is arena
    assert first.model is second.model
    first.close()
    assert arenas.find(socket) is arena
    second.close()
    assert arenas.find(socket) is None
    assert arena.runtime.closed
    arenas.attach(socket).add(entry).close()


def test_an_engine_finds_the_weights_of_one_that_has_ended(
    owner: Runtime, socket: Path, tmp_path: Path
) -> None:
    entry = entry_of(tmp_path)
    names = set()
    for turn in range(3):
        with closing(arenas.attach(socket).add(entry)) as weights:
            weights.wake()
            weights.verify()
            assert_right(weights)
            names.add(weights.model.name)
        assert owner.snapshot().layers_loaded == LAYERS, f"turn {turn}"
    assert names == {*owner.snapshot().models}
    assert len(names) == 1


def hold_until_killed(socket: str, root: str) -> None:
    """Hold a lease in a process of its own, which writes a line once it has the weights."""
    weights = arenas.attach(Path(socket)).add(entry_of(Path(root)))
    with weights.runtime.lease(weights.model):
        print("has them", flush=True)
        signal.pause()


def test_an_engine_finds_the_weights_of_one_that_was_killed(
    owner: Runtime, socket: Path, tmp_path: Path
) -> None:
    entry = entry_of(tmp_path)
    script = "import sys, test_vllm_broker as t; t.hold_until_killed(*sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", script, socket, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "has them\n"
        worker.kill()
    loaded = owner.snapshot().bytes_loaded
    assert loaded
    with closing(arenas.attach(socket).add(entry)) as weights:
        weights.verify()
        assert_right(weights)
        assert owner.snapshot().bytes_loaded == loaded
        weights.sleep()  # no lease of the killed process is left
        assert not resident(owner, weights.model)


def test_workers_take_turns_in_an_arena_that_fits_one(
    owner: Runtime, socket: Path, tmp_path: Path
) -> None:
    names = ("chat", "coder")
    workers = {name: BrokerArena(socket).add(entry_of(tmp_path, name)) for name in names}
    for _ in range(4):
        for name, weights in workers.items():
            assert_right(weights, name)
    assert owner.snapshot().layers_loaded > 4 * LAYERS
    for weights in workers.values():
        weights.close()


def test_sleep_gives_the_memory_to_other_processes(
    owner: Runtime, socket: Path, tmp_path: Path
) -> None:
    arena, elsewhere = arenas.attach(socket), BrokerArena(socket)
    weights, other = arena.add(entry_of(tmp_path)), elsewhere.add(entry_of(tmp_path, "coder"))
    shared = arena.add(entry_of(tmp_path))
    weights.wake()
    weights.sleep()
    assert resident(owner, weights.model)  # the other engine of this process is awake
    shared.sleep()
    assert owner.snapshot().granules_free == owner.snapshot().granules
    other.wake()
    assert resident(owner, other.model)
    other.sleep()
    weights.wake()
    loaded = owner.snapshot().bytes_loaded
    weights.wake()
    assert owner.snapshot().bytes_loaded == loaded
    assert_right(weights)
    for each in (weights, shared, other):
        each.close()


def test_sleep_leaves_weights_that_another_process_computes_with(
    owner: Runtime, socket: Path, tmp_path: Path
) -> None:
    weights, other = (BrokerArena(socket).add(entry_of(tmp_path)) for _ in range(2))
    weights.wake()
    with other.runtime.lease(other.model) as lease:
        weights.sleep()
        assert resident(owner, weights.model)
        assert all(bool(tensor.isfinite().all()) for tensor in lease.tensors.values())
        with pytest.raises(Busy):
            other.sleep()
    other.sleep()
    assert not resident(owner, weights.model)
    weights.wake()
    assert resident(owner, weights.model)
    weights.close()
    other.close()


def test_an_entry_that_was_written_again_is_another_model(socket: Path, tmp_path: Path) -> None:
    old = entry_of(tmp_path)
    arena = arenas.attach(socket)
    before = arena.add(old)
    discard(old, "for a test")
    after = arena.add(entry_of(tmp_path))
    assert before.model.name != after.model.name
    assert_right(before)
    assert_right(after)
    before.close()
    after.close()


def test_only_mapped_pages_of_a_broker_s_arena_count(
    owner: Runtime, socket: Path, tmp_path: Path
) -> None:
    with Runtime("host", arena="8MiB") as runtime:
        assert arenas.Arena(runtime).unmapped(3 << 20) == 5 << 20
    assert arenas.attach(socket).nbytes == owner.snapshot().arena_bytes
    assert arenas.attach(socket).unmapped(3 << 20) == 0


def test_a_model_larger_than_the_arena_is_refused(socket: Path, tmp_path: Path) -> None:
    state = State(parameters={f"model.layers.{i}.weight": torch.ones(9) for i in range(5)})
    entry = Cache(tmp_path / "cache").write(Key("large", {"model": "large"}, {}), state)
    with pytest.raises(OutOfDeviceMemory, match="make the arena larger"):
        arenas.attach(socket).add(entry)


def test_a_path_without_a_broker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WarmServeError, match="no broker"):
        arenas.attach(tmp_path / "socket")
    assert arenas.find(tmp_path / "socket") is None
