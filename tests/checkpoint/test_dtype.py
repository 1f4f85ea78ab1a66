"""Risk: a cast during loading computes wrong values, or changes tensors that must stay exact.

Contents are compared byte for byte with torch's own casts, on every device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import GRANULE, write_safetensors
from conftest import Device, bytes_of
from hypothesis import given
from hypothesis import strategies as st

from warmserve_rt import CorruptCheckpoint, kernels
from warmserve_rt.checkpoint import DTYPES, TensorEntry, open_checkpoint
from warmserve_rt.checkpoint.dtypes import cast_kind, planned_casts
from warmserve_rt.checkpoint.layout import Layout, build_layout

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TARGETS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Tensors = dict[str, tuple[str, list[int], bytes]]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def tensors_of(dtypes: Mapping[str, tuple[str, list[int]]]) -> Tensors:
    """Return tensors of random content: numbers of all magnitudes for floats, else random bytes."""
    generator = torch.Generator().manual_seed(len(dtypes))
    made: Tensors = {}
    for name, (dtype, shape) in dtypes.items():
        count = math.prod(shape)
        if dtype in FLOATS:
            values = torch.randn(count, generator=generator)
            values *= 2.0 ** torch.randint(-30, 30, (count,), generator=generator)
            made[name] = (dtype, shape, raw(values.to(FLOATS[dtype])))
        else:
            made[name] = (dtype, shape, os.urandom(count * DTYPES[dtype].bits // 8))
    return made


def cast(dtype: str, data: bytes, target: str) -> bytes:
    """Cast as torch does."""
    values = torch.frombuffer(bytearray(data), dtype=FLOATS[dtype]) if data else torch.empty(0)
    return raw(values.to(FLOATS[target]))


def layout_of(path: Path, dtype: str) -> Layout:
    with closing(open_checkpoint(path)) as opened:
        return build_layout(opened, None, planned_casts(opened.tensors, dtype))


MIXED = {
    "model.embed.weight": ("F32", [3, 5]),
    "model.layers.0.up.bias": ("F16", [7]),
    "model.layers.0.up.weight": ("F32", [1_100_003]),  # granules and chunks end inside it
    "model.layers.0.down.weight": ("BF16", [777, 1001]),
    "model.layers.0.empty": ("F32", [0, 4]),
    "model.layers.0.mask": ("BOOL", [13]),
    "model.layers.0.seen": ("I64", []),
    "model.layers.0.phase": ("C64", [3]),
    "model.layers.0.scalar": ("F32", []),
    "model.layers.0.norm_a": ("F32", [256]),  # norm_a and norm_b are adjacent in file and layer
    "model.layers.0.norm_b": ("F32", [256]),
    "model.layers.1.half": ("F16", [600_001]),
    "lm_head.weight": ("BF16", [3, 3]),
}


@pytest.mark.parametrize("chunk", ["4KiB", "2MiB", "8MiB"])  # below a granule, one, several
@pytest.mark.parametrize("dtype", TARGETS)
def test_tensors_are_cast_as_torch_does(
    device: Device, tmp_path: Path, dtype: str, chunk: str
) -> None:
    target = TARGETS[dtype]
    tensors = tensors_of(MIXED)
    path = write_safetensors(tmp_path / "m", tensors)
    runtime = device.runtime(chunk=chunk, staging="8MiB")
    model = runtime.register("m", path, dtype=dtype)
    with runtime.lease("m"):
        for name, (was, shape, data) in tensors.items():
            spec = model.layout.tensors[name]
            wanted = cast(was, data, target) if was in FLOATS else data
            assert bytes_of(runtime, "m", name) == wanted, name
            assert spec.dtype.name == (target if was in FLOATS else was)
            assert (list(spec.shape), spec.nbytes) == (shape, len(wanted))
        for layer in model.layers:  # all bytes between tensors are zero
            memory = runtime.read_back("m", layer.index)
            for spec in layer.tensors:
                memory[spec.offset : spec.offset + spec.nbytes] = 0
            assert not memory.any()
    assert runtime.snapshot().models["m"].layers[1].nbytes == model.layers[1].nbytes


def test_overflow_and_nans_are_cast_as_torch_does(device: Device, tmp_path: Path) -> None:
    """Cast all f16 and bf16 values, and f32 values around those of bf16; NaNs must stay NaNs."""
    words = np.arange(1 << 16, dtype=np.uint16)
    wide = np.concatenate([words.astype(np.uint32) << 16 | low for low in (0, 0x7FFF, 0x8000)])
    tensors: Tensors = {
        "a": ("F16", [1 << 16], words.tobytes()),
        "b": ("BF16", [1 << 16], words.tobytes()),
        "c": ("F32", [len(wide)], wide.tobytes()),
    }
    path = write_safetensors(tmp_path / "m", tensors)
    for dtype, target in TARGETS.items():
        runtime = device.runtime()
        runtime.register("m", path, dtype=dtype)
        with runtime.lease("m"):
            for name, (was, _, data) in tensors.items():
                got, wanted = (
                    torch.frombuffer(bytearray(found), dtype=FLOATS[target])
                    for found in (bytes_of(runtime, "m", name), cast(was, data, target))
                )
                assert torch.equal(got.isnan(), wanted.isnan())
                numbers = ~wanted.isnan()
                assert raw(got[numbers]) == raw(wanted[numbers])


def test_narrowed_layers_take_fewer_granules(device: Device, tmp_path: Path) -> None:
    """Only the bytes of the target dtype are copied to the device."""
    path = write_safetensors(
        tmp_path / "m", tensors_of({f"h.{i}.w": ("F32", [1 << 20]) for i in range(3)})
    )
    runtime = device.runtime(arena=3 * GRANULE)
    model = runtime.register("m", path, dtype="bfloat16")
    runtime.prewarm("m").wait()
    assert model.nbytes == runtime.snapshot().bytes_loaded == 3 * GRANULE
    assert runtime.snapshot().models["m"].granules == 3


# The tensors that quantisers write for one linear layer.
QUANTISED = {
    "gptq": {
        "qweight": ("I32", [8, 16]),
        "qzeros": ("I32", [1, 2]),
        "scales": ("F16", [1, 16]),
        "g_idx": ("I32", [64]),
        "bias": ("F16", [16]),
    },
    "awq": {"qweight": ("I32", [64, 2]), "qzeros": ("I32", [1, 2]), "scales": ("F16", [1, 16])},
    "bitsandbytes": {
        "weight": ("U8", [512, 1]),
        "weight.absmax": ("F32", [16]),
        "weight.quant_map": ("F32", [16]),
        "weight.nested_absmax": ("F32", [1]),
        "weight.quant_state.bitsandbytes__nf4": ("U8", [77]),
        "bias": ("F32", [16]),
    },
    "llm.int8": {"weight": ("I8", [16, 64]), "SCB": ("F32", [16]), "weight_format": ("U8", [])},
    "fp8": {"weight": ("F8_E4M3", [128, 128]), "weight_scale_inv": ("F32", [1, 1])},
    "mxfp4": {"w_blocks": ("F4", [16, 32]), "w_scales": ("F8_E8M0", [16]), "w_bias": ("BF16", [1])},
}


@pytest.mark.parametrize("scheme", QUANTISED)
@pytest.mark.parametrize("dtype", TARGETS)
def test_quantised_layers_stay_exact(
    device: Device, tmp_path: Path, scheme: str, dtype: str
) -> None:
    block = "model.layers.0"
    linear = {f"{block}.mlp.up.{name}": entry for name, entry in QUANTISED[scheme].items()}
    plain = {
        f"{block}.norm.weight": ("F32", [16]),
        f"{block}.mlp.up_proj.weight": ("F16", [4, 4]),  # another module with the same prefix
        f"{block}.mlp.weight": ("BF16", [5]),
    }
    tensors = tensors_of({**linear, **plain})
    runtime = device.runtime()
    model = runtime.register("m", write_safetensors(tmp_path / "m", tensors), dtype=dtype)
    with runtime.lease("m"):
        for name, (was, _, data) in tensors.items():
            stays = name in linear
            wanted = data if stays else cast(was, data, TARGETS[dtype])
            assert bytes_of(runtime, "m", name) == wanted, name
            assert model.layout.tensors[name].dtype.name == (was if stays else TARGETS[dtype])


def test_without_a_dtype_nothing_is_cast(device: Device, tmp_path: Path) -> None:
    tensors = tensors_of({**MIXED, "double": ("F64", [3])})
    runtime = device.runtime()
    runtime.register("m", write_safetensors(tmp_path / "m", tensors))
    with runtime.lease("m"):
        for name, (_, _, data) in tensors.items():
            assert bytes_of(runtime, "m", name) == data


def test_adjacent_tensors_form_one_run_only_if_cast_alike(tmp_path: Path) -> None:
    """Adjacent tensors form one run only if their target bytes are adjacent in the layer.

    A tensor whose target has fewer bytes than the alignment is followed by a gap.
    """
    names = {
        "a": ("F32", [128]),  # 256 bytes as bf16
        "b": ("F32", [256]),
        "c": ("BF16", [128]),  # not cast
        "d": ("BF16", [128]),
        "e": ("F32", [64]),  # 128 bytes as bf16, and then a gap
        "f": ("F32", [64]),
    }
    path = write_safetensors(tmp_path / "m", tensors_of(names))
    (layer,) = layout_of(path, "bfloat16").layers
    found = [(s.layer_offset, s.nbytes, s.cast) for s in layer.segments]
    kind = "f32_to_bf16"
    assert found == [(0, 768, kind), (768, 512, None), (1280, 128, kind), (1536, 128, kind)]
    start = layer.segments[0].file_offset
    assert [s.file_offset - start for s in layer.segments] == [0, 1536, 2048, 2304]


def test_a_truncated_file_of_cast_tensors_is_refused(device: Device, tmp_path: Path) -> None:
    tensors = tensors_of({"w": ("F32", [GRANULE])})
    path = write_safetensors(tmp_path / "m", tensors)
    runtime = device.runtime()
    runtime.register("m", path, dtype="float16")
    runtime.prewarm("m").wait()
    runtime.evict("m")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptCheckpoint, match=r"m was replaced or changed|inside a tensor"):
        runtime.lease("m").acquire()
    runtime.check_invariants()


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "F8_E4M3", "F4", "int8", "I8", "float64", "F64", "half", "", "bf16"]
)
def test_invalid_target_dtypes_are_refused(device: Device, tmp_path: Path, dtype: str) -> None:
    path = write_safetensors(tmp_path / "m", tensors_of({"w": ("F32", [4])}))
    runtime = device.runtime()
    with pytest.raises(ValueError, match=f"dtype must be .*, got {dtype!r}"):
        runtime.register("m", path, dtype=dtype)
    runtime.register("m", path, dtype="BF16")


def test_f64_is_refused_by_its_name(device: Device, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m", tensors_of({"a": ("F32", [4]), "b.w": ("F64", [4])}))
    runtime = device.runtime()
    with pytest.raises(ValueError, match=r"tensor 'b\.w' is F64"):
        runtime.register("m", path, dtype="float32")
    assert runtime.models == ()


def test_a_cast_that_cuts_elements_is_refused_natively(device: Device, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m", tensors_of({"w": ("F32", [512])}))
    runtime = device.runtime()
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        identity = (
            *(status.st_dev, status.st_ino, status.st_size),
            *(status.st_mtime_ns, status.st_ctime_ns),
        )
        for layer_offset, nbytes, kind, message in (
            (0, 1023, "f32_to_bf16", "splits an element"),
            (1, 1022, "f32_to_bf16", "splits an element"),
            (2, 1020, "f16_to_f32", "splits an element"),
            (0, 1026, "f32_to_bf16", "outside of its layer"),
            (0, 1024, "f64_to_bf16", "unknown cast 'f64_to_bf16'"),
        ):
            layers = [(1024, [(0, 8, layer_offset, nbytes, kind)])]
            with pytest.raises(ValueError, match=message):
                runtime.native.register(
                    "m", [(file.fileno(), str(path), identity)], layers, writable=False
                )


PARTS = st.sampled_from(["a", "b", "ab", "w", ""])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
FOREIGN = st.sampled_from(sorted(DTYPES.keys() - {"F64"}))
PACKED = {name for name in DTYPES if name[:3] in ("U8", "I8", "U16", "I16", "U32", "I32")} | {
    name for name in DTYPES if name.startswith("F") and name not in ("F16", "F32", "F64")
}


@given(st.dictionaries(NAMES, FOREIGN, max_size=8), st.sampled_from(sorted(TARGETS)))
def test_planned_casts_follow_the_rule(dtypes: dict[str, str], dtype: str) -> None:
    """Compare the planned casts with the rule written anew, for each pair of tensors."""
    target = TARGETS[dtype]
    entries = {
        name: TensorEntry(name, DTYPES[found], (), 0, 0, 0) for name, found in dtypes.items()
    }

    def belongs(name: str, other: str) -> bool:
        module = name[: name.rfind(".")] if "." in name else ""
        return name.startswith(other + ".") or (
            module == (other[: other.rfind(".")] if "." in other else "")
        )

    packed = [name for name, found in dtypes.items() if found in PACKED]
    wanted = {
        name
        for name, found in dtypes.items()
        if found in FLOATS and found != target and not any(belongs(name, other) for other in packed)
    }
    casts = planned_casts(entries, dtype)
    assert casts == dict.fromkeys(wanted, DTYPES[target])
    assert {cast_kind(DTYPES[dtypes[name]], found) for name, found in casts.items()} <= {
        *kernels.CASTS
    }
    some = sorted(entries)[::2]
    assert planned_casts(entries, dict.fromkeys(some, dtype)) == {
        name: cast for name, cast in casts.items() if name in some
    }
    with pytest.raises(ValueError, match="must name tensors of the checkpoint, got 'another'"):
        planned_casts(entries, {"another": dtype})
    double = TensorEntry("new.w", DTYPES["F64"], (), 0, 0, 0)
    with pytest.raises(ValueError, match=r"'new\.w' is F64"):
        planned_casts({**entries, "new.w": double}, dtype)
