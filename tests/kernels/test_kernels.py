"""Compare the weight kernels' CPU bodies with torch, numpy and independent Python models."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warmserve_rt import _native, kernels

CSRC = Path(__file__).resolve().parents[2] / "csrc"

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TYPES = {
    "f32_to_bf16": (torch.float32, torch.bfloat16),
    "f32_to_f16": (torch.float32, torch.float16),
    "f16_to_f32": (torch.float16, torch.float32),
    "f16_to_bf16": (torch.float16, torch.bfloat16),
    "bf16_to_f32": (torch.bfloat16, torch.float32),
    "bf16_to_f16": (torch.bfloat16, torch.float16),
    "f8_e4m3_to_bf16": (E4M3, torch.bfloat16),
    "f8_e5m2_to_bf16": (E5M2, torch.bfloat16),
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}  # the bits that every NaN is cast to


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def all_of(dtype: torch.dtype) -> torch.Tensor:
    """Return all values of a type; for f32, the values near each bf16 and f16, and random ones."""
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    words = np.arange(1 << 16, dtype=np.uint32) << 16
    # Values around each bf16 and f16 value, and around the midpoints at which rounding changes.
    near = [words + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    near += [words | (low << 12) for low in range(16)]
    near += [(words | (low << 12)) + one for low in (1, 3, 9) for one in (1, 0xFFFFFFFF)]
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        between = (halves[:-1].astype(np.float64) + halves[1:].astype(np.float64)) / 2
    near += [between.astype(np.float32).view(np.uint32) + one for one in (0, 1, 0xFFFFFFFF)]
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    return torch.from_numpy(np.concatenate([*near, random]).view(np.int32)).view(torch.float32)


def expect(out: torch.Tensor, wanted: torch.Tensor) -> None:
    nan = wanted.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(bits(out)[~nan], bits(wanted)[~nan])
    if out.dtype in NAN:
        assert (bits(out)[nan] == NAN[out.dtype]).all()


@pytest.mark.parametrize("kind", kernels.CASTS)
def test_cast_equals_torch_for_every_value(kind: str) -> None:
    source_type, target_type = TYPES[kind]
    source = all_of(source_type)
    out = torch.empty(source.shape, dtype=target_type)
    kernels.cast(kind, source, out)
    wanted = source.float().to(target_type)
    expect(out, wanted)
    if kind == "bf16_to_f32":
        assert torch.equal(bits(out), bits(source).int() << 16)
    if kind == "f16_to_f32":
        words = bits(source)[source.isnan()].int()
        kept = (words & 0x8000) << 16 | 0x7F800000 | (words & 0x3FF) << 13
        assert torch.equal(bits(out)[source.isnan()], kept)


@pytest.mark.parametrize("kind", kernels.CASTS)
def test_cast_of_odd_counts_at_odd_addresses_writes_nothing_else(kind: str) -> None:
    source_type, target_type = TYPES[kind]
    values = all_of(source_type)
    for count in (*range(0, 70, 3), 127, 128, 129, 255):
        for skew in (0, 1, 3):
            part = values[-count:] if count else values[:0]
            source = np.zeros(count * source_type.itemsize + skew, np.uint8)
            source[skew:] = part.view(torch.uint8).numpy()
            room = np.full(count * target_type.itemsize + skew + 64, 0xA5, np.uint8)
            kernels.cast(kind, source[skew:], room[skew : len(room) - 64])
            out = torch.empty(count, dtype=target_type)
            out.view(torch.uint8).numpy()[:] = room[skew : len(room) - 64]
            expect(out, part.float().to(target_type))
            assert (room[:skew] == 0xA5).all()
            assert (room[len(room) - 64 :] == 0xA5).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (256, 256), (130, 300), (7, 1), (1, 129)])
@pytest.mark.parametrize("block", ["tensor", "row", "column", (128, 128), (2, 3), (1, 32), (5, 1)])
def test_fp8_is_scaled_by_its_block(dtype, shape, block) -> None:
    rows, columns = shape
    shapes = {"tensor": shape, "row": (1, columns), "column": (rows, 1)}
    height, width = shapes.get(block, block)
    generator = torch.Generator().manual_seed(rows * columns)
    source = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)
    scales = torch.randn(-(-rows // height), -(-columns // width), generator=generator)
    flat = scales.view(-1)
    special = torch.tensor([0.0, float("inf"), float("nan"), 1e38, 1e-38, 1e-44, -3.0, 448.0])
    picks = torch.arange(0, len(flat), 3)
    flat[picks] = special[picks % len(special)]
    kind = "f8_e4m3_to_bf16" if dtype == E4M3 else "f8_e5m2_to_bf16"
    out = torch.empty(shape, dtype=torch.bfloat16)
    kernels.cast(kind, source, out, scales, block=(height, width))
    spread = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    expect(out, (source.float() * spread).bfloat16())


def test_fp8_with_one_scale_takes_all_values() -> None:
    for dtype, kind in ((E4M3, "f8_e4m3_to_bf16"), (E5M2, "f8_e5m2_to_bf16")):
        source = all_of(dtype).view(16, 16)
        out = torch.empty(16, 16, dtype=torch.bfloat16)
        for scale in (1.0, 0.0123, 1e-39, 3e38):
            factor = np.array([scale], np.float32)
            kernels.cast(kind, source, out, factor, block=(1 << 40, 1 << 40))
            expect(out, (source.float() * torch.from_numpy(factor)).bfloat16())


# (rows, row_bytes, pitch, offset). The last five are so large that stores bypass the cache.
GATHERS = [
    (rows, row_bytes, row_bytes * parts + extra, offset)
    for rows in (0, 1, 7)
    for row_bytes in (0, 1, 3, 16, 64, 4097)
    for parts, extra in ((1, 0), (1, 1), (2, 0), (4, 32))
    for offset in (0, 1, 16)
] + [
    (9000, 512, 1024, 512),
    (9000, 512, 520, 3),
    (4200, 1024, 4096, 0),
    (3000, 1600, 1664, 1),
    (200, 32768, 65536, 0),
]


@pytest.mark.parametrize(("rows", "row_bytes", "pitch", "offset"), GATHERS)
def test_gather_equals_a_numpy_slice(rows: int, row_bytes: int, pitch: int, offset: int) -> None:
    size = offset + (max(rows - 1, 0) * pitch + row_bytes if rows else 0)
    source = np.random.default_rng(size).integers(0, 256, size + rows * pitch, dtype=np.uint8)
    for skew in (0, 1):
        room = np.full(rows * row_bytes + 64 + skew, 0xA5, np.uint8)
        target = room[skew : skew + rows * row_bytes]
        kernels.gather_rows(
            source[:size], target, rows=rows, row_bytes=row_bytes, pitch=pitch, offset=offset
        )
        wanted = source[offset : offset + rows * pitch].reshape(rows, pitch)[:, :row_bytes]
        assert np.array_equal(target.reshape(rows, row_bytes), wanted)
        assert (room[:skew] == 0xA5).all()
        assert (room[len(room) - 64 :] == 0xA5).all()


def test_gather_makes_a_column_parallel_shard() -> None:
    weight = torch.randn(96, 64).bfloat16()
    shard = torch.empty(96, 16, dtype=torch.bfloat16)
    kernels.gather_rows(weight, shard, rows=96, row_bytes=32, pitch=128, offset=3 * 32)
    assert torch.equal(shard, weight[:, 48:])


def digest_model(data: bytes) -> int:
    """Compute the formula of weight_kernels.inl with Python's own integers."""
    full = 1 << 64
    total = len(data) * 0x9E3779B97F4A7C15
    for i in range(0, len(data), 4):
        word = int.from_bytes(data[i : i + 4], "little")
        x = i // 4 * 0x9E3779B1 % (1 << 32)
        total += (word ^ x ^ x >> 16) ** 2
    total %= full
    for _ in range(2):
        total = (total ^ total >> 32) * 0xD6E8FEB86659FD93 % full
    return total ^ total >> 32


BYTES = st.binary(min_size=0, max_size=400)


@given(BYTES, st.integers(1, 97), st.integers(0, 7))
def test_digest_follows_the_formula(data: bytes, granule: int, skew: int) -> None:
    room = np.frombuffer(bytes(skew) + data, np.uint8)
    digests = kernels.granule_digest(room[skew:], granule)
    parts = [data[i : i + granule] for i in range(0, len(data), granule)]
    assert digests.dtype == np.uint64
    assert digests.tolist() == [digest_model(part) for part in parts]


def test_digest_of_megabytes_follows_the_formula() -> None:
    data = np.random.default_rng(1).integers(0, 1 << 32, 3 << 18, dtype=np.uint32)
    digests = kernels.granule_digest(data)
    assert digests.tolist() == [
        digest_model(data[: 1 << 19].tobytes()),
        digest_model(data[1 << 19 :].tobytes()),
    ]


def one(data: bytes | np.ndarray) -> int:
    (digest,) = kernels.granule_digest(data, memoryview(data).nbytes)
    return int(digest)


@given(st.binary(min_size=1, max_size=400), st.data())
@settings(max_examples=200)
def test_a_flipped_bit_changes_the_digest(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    assert one(bytes(flipped)) != one(data)


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=2, max_size=80), st.data())
@settings(max_examples=200)
def test_exchanged_words_change_the_digest(words: list[int], draw: st.DataObject) -> None:
    a, b = (draw.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    moved = list(words)
    moved[a], moved[b] = moved[b], moved[a]
    same = moved == words
    assert (one(np.array(moved, np.uint32)) == one(np.array(words, np.uint32))) == same


@given(st.binary(min_size=1, max_size=100), st.integers(1, 9))
def test_zeros_at_the_end_change_the_digest(data: bytes, zeros: int) -> None:
    assert one(data + bytes(zeros)) != one(data)


@pytest.mark.parametrize("distance", [1, 1 << 10, 1 << 16, 1 << 19])
def test_exchanged_blocks_change_the_digest(distance: int) -> None:
    """Exchange two blocks: bf16 noise, a block and its permutation, words with other signs."""
    random = np.random.default_rng(distance)
    noise = torch.randn(4 * distance, generator=torch.Generator().manual_seed(distance)).bfloat16()
    words = noise.view(torch.uint8).numpy().view(np.uint32)
    shuffled = np.concatenate([words[:distance], random.permutation(words[:distance])])
    signs = np.concatenate([words[:distance], words[:distance] ^ 0x80008000])
    for both in (words[: 2 * distance], shuffled, signs):
        swapped = np.concatenate([both[distance:], both[:distance]])
        if not np.array_equal(swapped, both):
            assert one(swapped) != one(both)


def test_swapped_granules_swap_their_digests() -> None:
    data = np.random.default_rng(2).integers(0, 256, 4096, dtype=np.uint8)
    digests = kernels.granule_digest(data, 1024)
    assert len(set(digests.tolist())) == 4
    swapped = np.concatenate([data[1024:2048], data[:1024], data[2048:]])
    assert kernels.granule_digest(swapped, 1024).tolist() == digests[[1, 0, 2, 3]].tolist()


def test_arguments_that_do_not_fit_are_value_errors() -> None:
    four, two = np.zeros(16, np.float32), np.zeros(16, np.uint16)
    eight = np.zeros((4, 4), np.uint8)
    scale = np.ones(1, np.float32)
    for call in (
        lambda: kernels.cast("f64_to_f16", four, two),
        lambda: kernels.cast("f32_to_bf16", four, two[:-1]),
        lambda: kernels.cast("f32_to_bf16", four.view(np.uint8)[:-1], two),
        lambda: kernels.cast("f32_to_bf16", four, four.view(np.uint16)[:16]),  # overlaps
        lambda: kernels.cast("f32_to_bf16", four.reshape(4, 4), two, scale, block=(4, 4)),
        lambda: kernels.cast("f8_e4m3_to_bf16", eight, two, scale),
        lambda: kernels.cast("f8_e4m3_to_bf16", eight, two, block=(4, 4)),
        lambda: kernels.cast("f8_e4m3_to_bf16", eight, two, scale, block=(4, 0)),
        lambda: kernels.cast("f8_e4m3_to_bf16", eight, two, scale, block=(4, 2)),
        lambda: kernels.cast("f8_e4m3_to_bf16", eight.reshape(-1), two, scale, block=(4, 4)),
        lambda: kernels.cast("f8_e4m3_to_bf16", eight[:, ::2], two[:8]),
        lambda: _native.cast("f8_e4m3_to_bf16", eight, two, scale, 3, 1, 3),
        lambda: kernels.granule_digest(four, 0),
        lambda: kernels.gather_rows(four, eight, rows=4, row_bytes=4, pitch=3),
        lambda: kernels.gather_rows(four, eight, rows=4, row_bytes=4, pitch=32),
        lambda: kernels.gather_rows(four, eight, rows=3, row_bytes=4, pitch=8),
        lambda: kernels.gather_rows(four, eight, rows=4, row_bytes=4, pitch=8, offset=65),
        lambda: kernels.gather_rows(four, eight, rows=1 << 60, row_bytes=4, pitch=1 << 60),
    ):
        with pytest.raises(ValueError, match=r".+"):
            call()
    assert not two.any()
    assert not eight.any()


def test_a_read_only_target_is_refused() -> None:
    target = np.zeros(4, np.uint16)
    target.flags.writeable = False
    with pytest.raises(ValueError, match="must be writable"):
        kernels.cast("f32_to_bf16", np.zeros(4, np.float32), target)
    with pytest.raises(BufferError):
        _native.cast("f32_to_bf16", bytes(16), bytes(8))


def test_buffers_of_any_kind_are_taken() -> None:
    data = bytes(range(64))
    wanted = kernels.granule_digest(data, 16).tolist()
    tensor = torch.arange(64).to(torch.uint8)
    for same in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint32), tensor):
        assert kernels.granule_digest(same, 16).tolist() == wanted
    assert kernels.granule_digest(b"", 16).tolist() == []
    out = bytearray(4)
    kernels.cast("f32_to_bf16", np.array([1.0, -2.0], np.float32), out)
    assert out == bytes.fromhex("803f00c0")


def test_the_fatbin_has_the_magic_number_of_fatbins() -> None:
    path = kernels.fatbin_path()
    if path is None:
        pytest.skip("this installation has no GPU kernels")
    assert path.read_bytes()[:4] == bytes.fromhex("50ed55ba")  # a fatbin's magic


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_compiles_every_kernel(tmp_path: Path) -> None:
    """Compile the kernels; tests/native/kernel_threads.cpp checks their threads without a GPU."""
    ptx = tmp_path / "kernels.ptx"
    source = CSRC / "kernels" / "weight_kernels.cu"
    command = ["nvcc", "-ptx", "-std=c++20", "-arch=compute_80", f"-I{CSRC}", source, "-o", ptx]
    subprocess.run(command, check=True, capture_output=True, text=True)
    for name in ("ws_granule_digest", "ws_cast", "ws_gather_rows"):
        assert f".entry {name}(" in ptx.read_text()
