"""Risk: the host cache serves other bytes than the files', exceeds its budget, or reads the files
although it has a layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_safetensors
from conftest import Device, bytes_of

from warmserve_rt import Busy, Cancelled, CorruptCheckpoint, Runtime, testing

MIB = 1 << 20
staged = pytest.mark.parametrize("device", ["host-staged", "simcuda"], indirect=True)


def write(path: Path, value: int, layers: int = 2, nbytes: int = 2 * MIB) -> Path:
    random = np.random.default_rng(value)
    tensors: dict[str, Any] = {
        f"h.{i}.w": ("U8", [nbytes], random.bytes(nbytes)) for i in range(layers)
    }
    return write_safetensors(path, tensors)


def expected(value: int, layers: int = 2, nbytes: int = 2 * MIB) -> list[bytes]:
    random = np.random.default_rng(value)
    return [random.bytes(nbytes) for _ in range(layers)]


def bytes_read() -> int:
    """Return the bytes that this process has read from files so far."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


def load(runtime: Runtime, name: str) -> list[bytes]:
    """Load a model anew and return its layers' bytes."""
    runtime.evict(name)
    runtime.prewarm(name).wait()
    return [bytes_of(runtime, name, tensor) for tensor in runtime.model(name).layout.tensors]


@staged
def test_a_layer_in_the_cache_is_loaded_without_reading_its_file(
    device: Device, tmp_path: Path
) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True)
    runtime.register("m", write(tmp_path / "m", 1))
    assert load(runtime, "m") == expected(1)
    before = bytes_read()
    runtime.evict("m")
    runtime.prewarm("m").wait()
    assert bytes_read() - before < 64 << 10
    assert load(runtime, "m") == expected(1)
    cache = runtime.snapshot().host_cache
    assert (cache.hits, cache.misses, cache.hit_bytes) == (4, 2, 8 * MIB)
    assert (cache.layers, cache.bytes_in_use, cache.pinned_bytes) == (2, 4 * MIB, 8 * MIB)


@staged
def test_casts_are_in_the_cache(device: Device, tmp_path: Path) -> None:
    values = np.arange(1 << 20, dtype=np.float32) % 1000
    path = write_safetensors(tmp_path / "m", {"w": ("F32", [1 << 20], values.tobytes())})
    runtime = device.runtime(host_cache="8MiB", pump=True)
    runtime.register("m", path, dtype="float16")
    first = load(runtime, "m")
    assert first == [values.astype(np.float16).tobytes()]
    assert load(runtime, "m") == first
    assert runtime.snapshot().host_cache.hits == 1


@staged
@pytest.mark.parametrize("change", ["touch", "replace"])
def test_a_changed_file_is_never_served_from_the_cache(
    device: Device, tmp_path: Path, change: str
) -> None:
    path = write(tmp_path / "m", 1)
    runtime = device.runtime(host_cache="8MiB", pump=True)
    runtime.register("m", path)
    load(runtime, "m")
    if change == "touch":
        os.utime(path, ns=(1, 1))
    else:
        write(tmp_path / "new", 2).rename(path)
    with pytest.raises(CorruptCheckpoint, match=r"touched|another file or deleted"):
        load(runtime, "m")
    runtime.reload("m")
    assert load(runtime, "m") == expected(1 if change == "touch" else 2)


@staged
def test_images_leave_by_keep_value_then_by_last_use(device: Device, tmp_path: Path) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True)
    for value, name in enumerate("abc"):
        runtime.register(name, write(tmp_path / name, value))
    runtime.set_keep_value("a", 2.0)
    runtime.set_keep_value("c", 1.0)
    for name in "abc":  # c takes the place of b
        load(runtime, name)
    cache = runtime.snapshot().host_cache
    assert (cache.evictions, cache.bytes_in_use) == (2, 8 * MIB)
    load(runtime, "b")  # a miss, and no image is worth less than b
    assert runtime.snapshot().host_cache.evictions == 2
    load(runtime, "a")
    load(runtime, "c")
    cache = runtime.snapshot().host_cache
    assert (cache.hits, cache.misses) == (4, 8)


@staged
def test_an_unregistered_model_leaves_the_cache(device: Device, tmp_path: Path) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True)
    model = runtime.register("m", write(tmp_path / "m", 1))
    load(runtime, "m")
    runtime.unregister(model)
    cache = runtime.snapshot().host_cache
    assert (cache.layers, cache.bytes_in_use) == (0, 0)


@staged
def test_a_cancelled_load_leaves_nothing_in_the_cache(device: Device, tmp_path: Path) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True, chunk="1MiB")
    runtime.register("m", write(tmp_path / "m", 1))
    ticket = runtime.prewarm("m")
    for _ in range(2):  # starts the load, and reads half of the first layer
        runtime.step()
    ticket.cancel()
    while runtime.step():
        pass
    cache = runtime.snapshot().host_cache
    assert (cache.layers, cache.bytes_in_use) == (0, 0)
    assert load(runtime, "m") == expected(1)


@staged
def test_bytes_that_do_not_match_their_digest_are_not_kept(device: Device, tmp_path: Path) -> None:
    path = write(tmp_path / "m", 1, layers=1)
    runtime = device.runtime(host_cache="8MiB", pump=True)
    runtime.register("m", path, verify="full")
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CorruptCheckpoint, match="does not match its digest"):
        load(runtime, "m")
    assert runtime.snapshot().host_cache.layers == 0


@staged
def test_a_prewarm_to_the_host_leaves_the_device_alone(device: Device, tmp_path: Path) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True)
    runtime.register("m", write(tmp_path / "m", 1))
    calls = runtime.snapshot().driver_calls
    ticket = runtime.prewarm("m", to="host")
    ticket.wait()
    assert ticket.progress.fraction == 1.0
    now = runtime.snapshot()
    assert now.driver_calls == calls
    assert [(x.residency, x.cached) for x in now.models["m"].layers] == [("absent", True)] * 2
    before = bytes_read()
    runtime.prewarm("m").wait()
    assert bytes_read() - before < 64 << 10
    assert load(runtime, "m") == expected(1)
    assert runtime.prewarm("m", to="host").done


@staged
def test_a_prewarm_to_the_host_of_some_layers(device: Device, tmp_path: Path) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True)
    runtime.register("m", write(tmp_path / "m", 1))
    runtime.prewarm("m", layers=[1], to="host").wait(layer=1)
    assert [x.cached for x in runtime.snapshot().models["m"].layers] == [False, True]
    assert load(runtime, "m") == expected(1)
    assert runtime.snapshot().host_cache.hits == 1


@staged
def test_a_prewarm_of_more_than_the_cache_is_refused(device: Device, tmp_path: Path) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True)
    runtime.register("large", write(tmp_path / "large", 1, layers=5))
    with pytest.raises(ValueError, match="needs 10 MiB of a budget of 8 MiB"):
        runtime.prewarm("large", to="host")
    runtime.prewarm("large", layers=4, to="host").wait()
    assert runtime.snapshot().host_cache.bytes_in_use == 8 * MIB


@staged
def test_a_prewarm_to_the_host_evicts_no_higher_keep_value(device: Device, tmp_path: Path) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True)
    for value, name in enumerate("abc"):
        runtime.register(name, write(tmp_path / name, value))
    runtime.set_keep_value("a", 1.0)
    runtime.set_keep_value("b", 1.0)
    for name in "ab":
        runtime.prewarm(name, to="host").wait()
    with pytest.raises(Busy, match="does not fit beside layers of a higher keep value"):
        runtime.prewarm("c", to="host").wait()
    runtime.set_keep_value("c", 1.0)
    runtime.prewarm("c", to="host").wait()
    cached = {n: [x.cached for x in m.layers] for n, m in runtime.snapshot().models.items()}
    assert cached == {"a": [False] * 2, "b": [True] * 2, "c": [True] * 2}


@staged
def test_a_cancelled_prewarm_to_the_host_keeps_whole_layers(device: Device, tmp_path: Path) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True, chunk="1MiB")
    runtime.register("m", write(tmp_path / "m", 1))
    ticket = runtime.prewarm("m", to="host")
    while not runtime.snapshot().models["m"].layers[0].cached:
        assert runtime.step()
    ticket.cancel()
    while runtime.step():
        pass
    cache = runtime.snapshot().host_cache
    assert (cache.layers, cache.bytes_in_use) == (1, 2 * MIB)


@staged
@pytest.mark.parametrize("end", ["unregister", "reload", "close"])
def test_the_end_of_a_model_ends_its_prewarm_to_the_host(
    device: Device, tmp_path: Path, end: str
) -> None:
    runtime = device.runtime(host_cache="8MiB", pump=True, chunk="1MiB")
    runtime.register("m", write(tmp_path / "m", 1))
    ticket = runtime.prewarm("m", to="host")
    for _ in range(2):
        runtime.step()
    runtime.close() if end == "close" else getattr(runtime, end)("m")
    with pytest.raises(Cancelled, match=r"unregistered|reloaded|closed"):
        ticket.wait()


@staged
def test_a_prewarm_to_the_host_without_a_cache_is_refused(device: Device, tmp_path: Path) -> None:
    runtime = device.runtime()
    runtime.register("m", write(tmp_path / "m", 1))
    with pytest.raises(ValueError, match="has no host cache"):
        runtime.prewarm("m", to="host")
    with pytest.raises(ValueError, match="to must be 'device' or 'host', got 'disk'"):
        runtime.prewarm("m", to="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="evict_below must not be given"):
        runtime.prewarm("m", to="host", evict_below=1.0)


def test_a_cache_larger_than_the_machine_is_refused() -> None:
    watched = testing.watch(host_view=False)
    with pytest.raises(ValueError, match=r"host cache of .* exceeds the .* have left"):
        Runtime(driver=watched.driver, arena="4MiB", host_cache="1000TiB")
    watched.check()


@pytest.mark.parametrize("size", ["1MiB", -1, "lots"])
def test_an_invalid_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"host.cache"):
        Runtime(driver=testing.watch(host_view=False).driver, arena="4MiB", host_cache=size)


def test_a_device_that_the_cpu_writes_needs_no_cache(tmp_path: Path) -> None:
    with Runtime(arena="8MiB", host_cache="8MiB", pump=True, tensors="numpy") as runtime:
        runtime.register("m", write(tmp_path / "m", 1))
        assert load(runtime, "m") == expected(1)
        assert runtime.snapshot().host_cache.budget_bytes == 0
        with pytest.raises(ValueError, match="needs no host cache"):
            runtime.prewarm("m", to="host")


def test_the_cache_keeps_what_is_pinned_if_pinning_fails(tmp_path: Path) -> None:
    watched = testing.watch(host_view=False, pump=True)
    watched.faults.arm([(2, 2)], only="pinned_create", status="out_of_memory")
    with Runtime(
        driver=watched.driver, arena="8MiB", host_cache="258MiB", pump=True, tensors="numpy"
    ) as runtime:
        cache = runtime.snapshot().host_cache
        assert cache.pinned_bytes == 256 * MIB
        assert cache.error.startswith("the host cache stays at 256 MiB of 258 MiB: ")
        runtime.register("m", write(tmp_path / "m", 1))
        assert load(runtime, "m") == expected(1)
        assert load(runtime, "m") == expected(1)
        assert runtime.snapshot().host_cache.hits == 2
    watched.check()


def test_a_prewarm_to_memory_that_could_not_be_pinned_is_refused(tmp_path: Path) -> None:
    watched = testing.watch(host_view=False, pump=True)
    watched.faults.arm([(1, 1)], only="pinned_create", status="out_of_memory")
    with Runtime(
        driver=watched.driver, arena="8MiB", host_cache="8MiB", pump=True, tensors="numpy"
    ) as runtime:
        runtime.register("m", write(tmp_path / "m", 1))
        with pytest.raises(ValueError, match=r"a budget of 0 .*; the host cache stays at"):
            runtime.prewarm("m", to="host")
        assert load(runtime, "m") == expected(1)
    watched.check()


def test_a_runtime_can_be_closed_while_its_cache_is_pinned() -> None:
    watched = testing.watch(host_view=False)
    Runtime(driver=watched.driver, arena="4MiB", host_cache="1GiB", tensors="numpy").close()
    watched.check()


def test_a_process_can_exit_while_the_cache_is_pinned() -> None:
    program = """
from warmserve_rt import Runtime, testing
runtime = Runtime(driver=testing.watch(host_view=False).driver, arena="4MiB", host_cache="1GiB")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/", timeout=60)


def test_no_copy_crosses_from_one_pinned_slab_to_another(tmp_path: Path) -> None:
    nbytes = 600 * MIB  # three slabs
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}})
    path = tmp_path / "m.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(file.tell() + nbytes)
    with testing.simulated_cuda(memory="1GiB", content=4096, detector=False) as cuda:
        driver = testing.watch(cuda=cuda).driver
        with Runtime(
            driver=driver, arena="640MiB", granule="8MiB", host_cache="600MiB", tensors="dlpack",
            pump=True,
        ) as runtime:  # fmt: skip
            runtime.register("m", path)
            runtime.prewarm("m", to="host").wait()
            runtime.prewarm("m").wait()
            assert runtime.snapshot().host_cache.hits == 1


@pytest.fixture
def threads(tmp_path: Path) -> Iterator[Runtime]:
    watched = testing.watch(host_view=False)
    with Runtime(
        driver=watched.driver, arena="8MiB", staging="4MiB", chunk="1MiB", host_cache="8MiB",
        loaders=3, tensors="numpy",
    ) as runtime:  # fmt: skip
        yield runtime
    watched.check()


def test_loader_threads_share_the_cache(threads: Runtime, tmp_path: Path) -> None:
    for value, name in enumerate("abc"):
        threads.register(name, write(tmp_path / name, value))
    for turn in range(12):
        name = "abc"[turn % 3] if turn % 4 else "a"
        assert load(threads, name) == expected("abc".index(name))
        if turn % 3 == 0:
            threads.prewarm("abc"[turn // 3 % 3], to="host")
        cache = threads.snapshot().host_cache
        assert cache.bytes_in_use <= cache.budget_bytes
    threads.native.check_invariants()
