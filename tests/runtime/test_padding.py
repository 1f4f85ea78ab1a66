"""Risk: the bytes between a layer's end and its last granule's end are an earlier tenant's, or cost
bandwidth of the link."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from checkpoints import write_safetensors
from conftest import Device, address_of

from warmserve_rt import Runtime, testing

GRANULE = 2 << 20


def memory_at(device: Device, address: int, nbytes: int) -> bytes:
    if device.simulated:
        return device.simulated.peek(address, nbytes)
    return ctypes.string_at(address, nbytes)


@pytest.mark.parametrize("nbytes", [1000, GRANULE - 1, 3 * GRANULE + 4096])
def test_bytes_behind_a_layer_are_zero(device: Device, tmp_path: Path, nbytes: int) -> None:
    if device.name == "cuda:0":
        pytest.skip("the addresses of a GPU are not readable here")
    ones = write_safetensors(tmp_path / "ones", {"w": ("U8", [16 << 20], b"\1" * (16 << 20))})
    short = write_safetensors(tmp_path / "short", {"w": ("U8", [nbytes], b"\2" * nbytes)})
    runtime = device.runtime(granule="4MiB")
    runtime.register("an earlier tenant", ones)
    runtime.prewarm("an earlier tenant").wait()
    model = runtime.register("m", short)
    with runtime.lease(model) as lease:
        address = address_of(lease.tensors["w"])
        held = -(-nbytes // (4 << 20)) * (4 << 20)
        assert memory_at(device, address, nbytes) == b"\2" * nbytes
        assert memory_at(device, address + nbytes, held - nbytes) == bytes(held - nbytes)


def test_padding_is_not_sent_over_the_link(tmp_path: Path) -> None:
    tensors = {f"h.{i}.w": ("U8", [3000], b"\3" * 3000) for i in range(4)}
    path = write_safetensors(tmp_path / "m", tensors)
    with testing.simulated_cuda(memory="64MiB") as cuda:
        driver = testing.watch(cuda=cuda).driver
        with Runtime(
            driver=driver, arena="16MiB", granule="4MiB", max_padding=1, tensors="dlpack"
        ) as runtime:
            model = runtime.register("m", path)
            before = cuda.copied["h2d"]
            runtime.prewarm(model).wait()
            assert cuda.copied["h2d"] - before == model.nbytes
