"""Risk: a view shows other bytes than the checkpoint's, or allows a caller to change them."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_safetensors
from conftest import Device, bytes_of, on_the_host
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from warmserve_rt import Runtime, testing
from warmserve_rt.checkpoint import DTYPES
from warmserve_rt.core.views import native_view

BITS = {name: dtype.bits for name, dtype in DTYPES.items()}


def shape_for(name: str, rows: int, columns: int) -> list[int]:
    """Return a shape whose elements fill whole bytes."""
    return [rows, columns * {4: 2, 6: 4}.get(BITS[name], 1)]


def every_dtype(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    random = np.random.default_rng(0)
    tensors = {}
    for name, bits in BITS.items():
        shape = shape_for(name, 3, 5)
        nbytes = shape[0] * shape[1] * bits // 8
        data = random.integers(0, 2 if name == "BOOL" else 256, nbytes, np.uint8).tobytes()
        tensors[f"layers.0.{name}"] = (name, shape, data)
    tensors["layers.1.scalar"] = ("F32", [], np.float32(2.5).tobytes())
    tensors["layers.1.empty"] = ("BF16", [0, 7], b"")
    write_safetensors(path, tensors)
    return tensors


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@on_the_host
def test_views_show_every_dtype_byte_for_byte(
    device: Device, tmp_path: Path, framework: str
) -> None:
    tensors = every_dtype(tmp_path / "m")
    runtime = device.runtime(tensors=framework)
    runtime.register("m", tmp_path / "m")
    with runtime.lease("m") as lease:
        assert lease.tensors.keys() == tensors.keys()
        for name, (_, shape, data) in tensors.items():
            tensor = lease.tensors[name]
            if framework == "torch":
                raw = tensor.reshape(-1).view(torch.uint8) if tensor.dim() else tensor.reshape(1)
                assert raw.numpy().tobytes() == data, name
            else:
                assert tensor.tobytes() == data, name
            assert tensor.shape == tuple(shape) or tensor.dtype.itemsize == 1
    del tensor, lease
    if framework == "torch":
        del raw


@on_the_host
def test_torch_has_the_checkpoint_s_dtypes_and_shapes(device: Device, tmp_path: Path) -> None:
    every_dtype(tmp_path / "m")
    runtime = device.runtime(tensors="torch")
    runtime.register("m", tmp_path / "m")
    with runtime.lease("m") as lease, safe_open(tmp_path / "m", framework="pt") as reference:
        for name in reference.keys():  # noqa: SIM118
            if re.search("F6_", name):
                assert lease.tensors[name].dtype == torch.uint8
                continue
            wanted = reference.get_tensor(name)
            tensor = lease.tensors[name]
            assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
            if tensor.numel() and tensor.dim():
                assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)), name
    del tensor, lease


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_checkpoints_agree_with_safetensors(tmp_path: Path, data: st.DataObject) -> None:
    dtypes = st.sampled_from(sorted(name for name in BITS if BITS[name] >= 8))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for i in range(data.draw(st.integers(1, 8))):
        name = data.draw(dtypes)
        shape = data.draw(st.lists(st.integers(0, 40), max_size=3))
        nbytes = int(np.prod(shape, dtype=np.int64)) * BITS[name] // 8
        high = 2 if name == "BOOL" else 256
        blob = random.integers(0, high, nbytes, np.uint8).tobytes()
        tensors[f"h.{data.draw(st.integers(0, 3))}.t{i}"] = (name, shape, blob)
    path = write_safetensors(tmp_path / "random", tensors)
    watched = testing.watch(pump=True, host_view=data.draw(st.booleans()))
    runtime = Runtime(
        arena="16MiB",
        staging="2MiB",
        chunk="2MiB",
        pump=True,
        tensors="torch",
        driver=watched.driver,
    )
    runtime.register("m", path)
    with runtime.lease("m") as lease, safe_open(path, framework="pt") as reference:
        for name in tensors:
            ours, theirs = lease.tensors[name], reference.get_tensor(name)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert bytes(ours.reshape(-1).view(torch.uint8).tolist()) == tensors[name][2]
    runtime.unregister("m")
    runtime.close()
    del runtime, lease, ours
    gc.collect()
    watched.check()


@pytest.fixture
def floats(device: Device, tmp_path: Path) -> tuple[Runtime, np.ndarray[Any, Any]]:
    wanted = np.arange(3000, dtype=np.float32).reshape(30, 100)
    path = write_safetensors(tmp_path / "f", {"h.0.w": ("F32", [30, 100], wanted.tobytes())})
    runtime = device.runtime()
    runtime.register("f", path)
    return runtime, wanted


@on_the_host
def test_views_follow_the_dlpack_protocol(floats: tuple[Runtime, np.ndarray[Any, Any]]) -> None:
    runtime, wanted = floats
    model = runtime.model("f")
    with runtime.lease("f"):
        view = native_view(model.native, model.layout.tensors["h.0.w"])
        assert view.__dlpack_device__() == (1, 0)
        assert "dltensor_versioned" in repr(view.__dlpack__(max_version=(1, 3)))
        assert "dltensor_versioned" in repr(view.__dlpack__())
        shared, copied = np.from_dlpack(view), np.from_dlpack(view, copy=True)
        assert shared.ctypes.data == view.address
        assert not shared.flags.writeable
        assert copied.ctypes.data != view.address
        copied += 1
        assert (shared == wanted).all()
        for misuse in ({"max_version": (0, 8)}, {"dl_device": (2, 0)}, {"dl_device": "cuda"}):
            with pytest.raises(BufferError):
                view.__dlpack__(**misuse)
    del shared, copied, view


@on_the_host
def test_a_live_view_keeps_only_its_addresses(
    floats: tuple[Runtime, np.ndarray[Any, Any]],
) -> None:
    """After unregister, a live view's address is not given to another model."""
    runtime, _ = floats
    view = runtime.tensors("f")["h.0.w"]
    runtime.unregister("f")
    address = view.ctypes.data
    maps = Path("/proc/self/maps").read_text()
    spans = [
        (int(begin, 16), int(end, 16), flags)
        for begin, end, flags in re.findall(r"^(\w+)-(\w+) (\S+)", maps, re.MULTILINE)
    ]
    assert [flags for begin, end, flags in spans if begin <= address < end] == ["---p"]
    del view


@on_the_host
def test_a_torch_module_bound_once_keeps_working(
    device: Device, floats: tuple[Runtime, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    runtime = device.runtime(tensors="torch", arena="4MiB")
    weight = torch.randn(64, 64)
    for name, scale in (("x", 1.0), ("y", 2.0)):
        data = (weight * scale).numpy().tobytes()
        path = write_safetensors(tmp_path / name, {"h.0.w": ("F32", [64, 64], data)})
        runtime.register(name, path)
    filler = write_safetensors(tmp_path / "z", {"h.0.w": ("U8", [4 << 20], bytes(4 << 20))})
    runtime.register("z", filler)
    modules = {}
    for name in "xy":
        modules[name] = torch.nn.Linear(64, 64, bias=False, device="meta")
        parameter = torch.nn.Parameter(runtime.tensors(name)["h.0.w"], requires_grad=False)
        modules[name].weight = parameter
    sample = torch.randn(1, 64)
    for _ in range(3):
        for name, scale in (("x", 1.0), ("y", 2.0)):
            with runtime.lease(name):
                assert torch.equal(modules[name](sample), sample @ (weight * scale).T)
        with runtime.lease("z"):
            pass
    modules.clear()
    del parameter


def test_torch_is_imported_only_when_asked_for(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "f", {"h.0.w": ("F32", [2], bytes(8))})
    script = """
import sys, warmserve_rt
runtime = warmserve_rt.Runtime(arena="4MiB")
runtime.register("f", sys.argv[1])
with runtime.lease("f") as lease:
    assert not {"torch", "cupy", "safetensors", "transformers"} & set(sys.modules)
    lease.tensors
    assert "torch" in sys.modules
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "f")],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # the source tree would shadow the installed package
    )
    assert done.stdout == "fine\n", done.stderr


def test_read_back_returns_the_device_s_bytes(device: Device, tmp_path: Path) -> None:
    tensors = every_dtype(tmp_path / "m")
    ones = write_safetensors(tmp_path / "ones", {"w": ("U8", [16 << 20], b"\1" * (16 << 20))})
    runtime = device.runtime()
    runtime.register("an earlier tenant", ones)
    runtime.prewarm("an earlier tenant").wait()
    model = runtime.register("m", tmp_path / "m")
    runtime.prewarm("m").wait()
    for layer in model.layers:
        read = runtime.read_back(model, layer.index)
        assert read.nbytes == layer.nbytes
        expected = bytearray(layer.nbytes)
        for spec in layer.tensors:
            expected[spec.offset : spec.offset + spec.nbytes] = tensors[spec.name][2]
        assert read.tobytes() == bytes(expected)  # with zeros between tensors


def test_layers_may_be_named_by_the_caller(device: Device, tmp_path: Path) -> None:
    tensors = {f"t{i}": ("U8", [10], bytes([i] * 10)) for i in range(4)}
    path = write_safetensors(tmp_path / "m", tensors)
    runtime = device.runtime()
    model = runtime.register("m", path, layers={"late": ["t3"], "early": ["t0", "t1", "t2"]})
    assert [layer.name for layer in model.layers] == ["late", "early"]
    with runtime.lease(model):
        for name, (_, _, data) in tensors.items():
            assert bytes_of(runtime, model, name) == data


def test_a_directory_with_an_index_can_be_registered(device: Device, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"h.0.w": ("U8", [3], b"abc")})
    write_safetensors(tmp_path / "b.safetensors", {"h.1.w": ("U8", [3], b"def")})
    index = {"weight_map": {"h.0.w": "a.safetensors", "h.1.w": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    runtime = device.runtime()
    runtime.register("m", tmp_path)
    with runtime.lease("m") as lease:
        assert {name: bytes_of(runtime, "m", name) for name in lease.tensors} == {
            "h.0.w": b"abc",
            "h.1.w": b"def",
        }


def test_layer_bytes_gives_a_range_of_a_layer(device: Device, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m", {"h.0.w": ("U8", [6], b"abcdef")})
    runtime = device.runtime()
    model = runtime.register("m", path)
    whole, part = model.layer_bytes("h.0"), model.layer_bytes(0, 2, 5)
    assert (whole.nbytes, part.nbytes, part.address - whole.address) == (6, 3, 2)
    stream, out = runtime.stream(), bytearray(3)
    with runtime.lease(model):
        stream.copy_from(out, part)
        stream.synchronize()
    assert out == b"cde"
    for first, last in [(-1, 2), (4, 3), (0, 7)]:
        with pytest.raises(ValueError, match="must be in"):
            model.layer_bytes(0, first, last)
    with pytest.raises(ValueError, match="no layer 1"):
        model.layer_bytes(1)


def test_the_lease_epoch_tells_leases_apart(device: Device, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m", {"h.0.w": ("U8", [6], b"abcdef")})
    runtime = device.runtime()
    model = runtime.register("m", path)
    assert model.lease_epoch == 0
    with runtime.lease(model):
        first = model.lease_epoch
    with runtime.lease(model):
        assert model.leased
        assert 0 < first != model.lease_epoch > 0
    assert model.lease_epoch == 0
