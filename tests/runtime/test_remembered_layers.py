"""Risk: a granule is said to contain a layer that it does not contain, or no longer contains."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_model

from warmserve_rt import CorruptCheckpoint, Runtime, WarmServeError, _native

GRANULES = 8
SIZES = (GRANULE, 3 * GRANULE - 8)  # four granules
TAIL = 24  # bytes of the record of one granule


class Memory:
    """An arena's memory and its contents record, as a keeper holds them."""

    def __init__(self, granules: int = GRANULES) -> None:
        self.arena, self.record = os.memfd_create("arena"), os.memfd_create("record")
        os.ftruncate(self.arena, granules * GRANULE)
        os.ftruncate(self.record, _native.bytes_of_contents(granules))

    def driver(self) -> _native.Driver:
        return _native.host_driver(memory=self.arena, contents=self.record)

    def runtime(self, driver: _native.Driver | None = None, **options: object) -> Runtime:
        return Runtime(
            arena=GRANULES * GRANULE,
            granule=GRANULE,
            tensors="numpy",
            driver=driver or self.driver(),
            **options,  # type: ignore[arg-type]
        )

    def close(self) -> None:
        os.close(self.arena)
        os.close(self.record)


@pytest.fixture
def memory() -> Iterator[Memory]:
    with closing(Memory()) as made:
        yield made


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: write_model(tmp_path / name, name, SIZES) for name in "abc"}


def read(runtime: Runtime, name: str) -> bool:
    """Lease a model, check its bytes, and return whether any were loaded."""
    before = runtime.snapshot().bytes_loaded
    with runtime.lease(name) as lease:
        for i, (tensor, size) in enumerate(zip(lease.tensors.values(), SIZES, strict=True)):
            assert np.asarray(tensor).tobytes() == content(name, i, size)
    runtime.check_invariants()
    return runtime.snapshot().bytes_loaded > before


def test_an_evicted_layer_is_loaded_again_without_reading(
    memory: Memory, files: dict[str, Path]
) -> None:
    strict = _native.StrictDriver(memory.driver())
    with memory.runtime(strict) as runtime:
        runtime.register("a", files["a"])
        assert read(runtime, "a")
        runtime.evict("a")
        assert not read(runtime, "a")
    assert not strict.violations


def test_granules_that_contain_nothing_are_taken_first(
    memory: Memory, files: dict[str, Path]
) -> None:
    with memory.runtime() as runtime:
        for name, path in files.items():
            runtime.register(name, path)
        assert read(runtime, "a")
        runtime.evict("a")
        assert read(runtime, "b")
        runtime.evict("b")
        assert not read(runtime, "a")
        runtime.evict("a")
        assert read(runtime, "c")  # over `a` or `b`, of which no granule is left then
        assert not read(runtime, "c")
        reread = [read(runtime, "a"), read(runtime, "b")]
        assert reread.count(True) >= 1


def test_the_next_runtime_finds_the_layers(memory: Memory, files: dict[str, Path]) -> None:
    with memory.runtime() as runtime:
        runtime.register("a", files["a"])
        assert read(runtime, "a")
    with memory.runtime() as runtime:
        runtime.register("b", files["b"])
        runtime.register("a", files["a"])
        assert read(runtime, "b")
        assert not read(runtime, "a")


def test_another_name_or_file_is_another_layer(memory: Memory, files: dict[str, Path]) -> None:
    with memory.runtime() as runtime:
        runtime.register("a", files["a"])
        runtime.register("b", files["a"])
        assert read(runtime, "a")
        before = runtime.snapshot().bytes_loaded
        with runtime.lease("b"):
            assert runtime.snapshot().bytes_loaded - before == sum(SIZES)
    os.utime(files["a"], (1, 1))
    with memory.runtime() as runtime:
        runtime.register("a", files["a"])
        assert read(runtime, "a")


def test_a_writable_model_is_not_remembered(memory: Memory, files: dict[str, Path]) -> None:
    with memory.runtime() as runtime:
        runtime.register("a", files["a"], writable=True)
        with runtime.lease("a") as lease:
            next(iter(lease.tensors.values()))[0] ^= 1
        runtime.evict("a")
        assert read(runtime, "a")


def test_a_file_that_has_changed_is_noticed(memory: Memory, files: dict[str, Path]) -> None:
    with memory.runtime() as runtime:
        runtime.register("a", files["a"])
        assert read(runtime, "a")
        write_model(files["a"], "a", SIZES, revision=1)
        assert not read(runtime, "a")  # it is resident
        runtime.evict("a")
        with pytest.raises(CorruptCheckpoint), runtime.lease("a"):
            pass
        runtime.check_invariants()
        runtime.reload("a")
        with runtime.lease("a") as lease:
            for i, (tensor, size) in enumerate(zip(lease.tensors.values(), SIZES, strict=True)):
                assert np.asarray(tensor).tobytes() == content("a", i, size, 1)
        runtime.check_invariants()


def test_bytes_that_were_not_checked_are_loaded_again_for_a_model_with_digests(
    memory: Memory, files: dict[str, Path]
) -> None:
    with memory.runtime() as runtime:
        runtime.register("a", files["a"])
        assert read(runtime, "a")
    for again in (True, False):
        with memory.runtime() as runtime:
            runtime.register("a", files["a"], verify="full")
            assert read(runtime, "a") == again


def test_given_memory_is_not_trimmed(memory: Memory) -> None:
    with (
        memory.runtime() as runtime,
        pytest.raises(ValueError, match="for memory that was given to the driver"),
    ):
        runtime.trim()


@pytest.mark.parametrize("granule", range(4))
def test_a_torn_record_is_none(memory: Memory, files: dict[str, Path], granule: int) -> None:
    with memory.runtime() as runtime:
        runtime.register("a", files["a"])
        assert read(runtime, "a")
    size = _native.bytes_of_contents(GRANULES)
    begin = size - GRANULES * TAIL + granule * TAIL
    os.pwrite(memory.record, bytes(TAIL), begin)
    with memory.runtime() as runtime:
        runtime.register("a", files["a"])
        before = runtime.snapshot().bytes_loaded
        assert read(runtime, "a")
        # The other layer, whose record is whole, is not read.
        lost = SIZES[0] if granule == 0 else SIZES[1]
        assert runtime.snapshot().bytes_loaded - before == lost


def test_any_record_is_read_without_harm(memory: Memory, files: dict[str, Path]) -> None:
    rng = random.Random(7)
    with memory.runtime() as runtime:
        runtime.register("a", files["a"])
        runtime.register("b", files["b"])
        assert read(runtime, "a")
        assert read(runtime, "b")
    size = _native.bytes_of_contents(GRANULES)
    whole = os.pread(memory.record, size, 0)
    for _ in range(50):
        torn = bytearray(whole)
        for _ in range(rng.randint(1, 6)):  # what a dead process has half written: zeros, and parts
            at = rng.randrange(GRANULES)
            begin = size - GRANULES * TAIL + at * TAIL + 16
            torn[begin : begin + 8] = rng.choice(
                [
                    bytes(8),
                    (9).to_bytes(8, "little"),
                    (2**40 + 1).to_bytes(8, "little"),
                    b"\xff" * 8,
                ]
            )
        os.pwrite(memory.record, bytes(torn), 0)
        with memory.runtime() as runtime:
            runtime.register("a", files["a"])
            runtime.register("b", files["b"])
            read(runtime, "a")
            read(runtime, "b")


def test_a_record_of_other_granules_is_refused(memory: Memory) -> None:
    memory.runtime().close()
    with pytest.raises(WarmServeError, match="of an arena of other granules"):
        Runtime(arena=4 * GRANULE, granule=2 * GRANULE, driver=memory.driver())
    os.ftruncate(memory.record, 100)
    with pytest.raises(
        WarmServeError, match="the contents record of the arena has 100 B, but needs"
    ):
        memory.runtime()


def test_memory_that_is_too_small_is_refused() -> None:
    with closing(Memory(4)) as small:
        driver = _native.host_driver(memory=small.arena)
        with pytest.raises(WarmServeError, match="the given memfd has 8 MiB"):
            Runtime(arena=8 * GRANULE, granule=GRANULE, driver=driver)


def test_a_descriptor_of_no_memory_is_refused() -> None:
    with pytest.raises(WarmServeError, match="of the arena's memfd"):
        _native.host_driver(memory=10**6)


def test_random_loads_and_evictions_give_right_bytes(
    memory: Memory, files: dict[str, Path]
) -> None:
    rng = random.Random(11)
    for _ in range(6):
        with memory.runtime(loaders=2) as runtime:
            for name, path in files.items():
                runtime.register(name, path)
            for _ in range(30):
                name = rng.choice("abc")
                action = rng.random()
                if action < 0.4:
                    read(runtime, name)
                elif action < 0.7:
                    runtime.prewarm(name, layers=[rng.randrange(2)])
                else:
                    runtime.evict(name, layers=[rng.randrange(2)])
