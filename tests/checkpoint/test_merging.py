"""Risk: merged layers leave more memory unused than promised, lose a byte, or differ by the run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import pytest
from checkpoints import write_safetensors
from conftest import Device, bytes_of
from hypothesis import given
from hypothesis import strategies as st

from warmserve_rt import Model, Runtime
from warmserve_rt.checkpoint import open_checkpoint
from warmserve_rt.checkpoint.layout import Layout, build_layout

MIB = 1 << 20


def write_blocks(path: Path, sizes: Sequence[int]) -> Path:
    """Write a model of blocks with these bytes."""
    tensors = {f"h.{i}.w": ("U8", [size], bytes([i % 251]) * size) for i, size in enumerate(sizes)}
    return write_safetensors(path, tensors)


def laid_out(sizes: Sequence[int], granule: int, max_padding: float) -> Layout:
    with tempfile.TemporaryDirectory() as folder:
        path = write_blocks(Path(folder) / "m.safetensors", sizes)
        with closing(open_checkpoint(path)) as opened:
            return build_layout(opened, granule=granule, max_padding=max_padding)


def padding(nbytes: int, granule: int) -> Fraction:
    taken = -(-nbytes // granule) * granule
    return Fraction(taken - nbytes, max(taken, 1))


def plain(sizes: Sequence[int], granule: int, max_padding: float) -> list[int]:
    """Return the number of blocks in each merged layer."""
    runs: list[list[int]] = []
    fits = [True]

    def measure() -> bool:
        return padding(sum(runs[-1]), granule) <= Fraction(max_padding)

    for size in sizes:
        if fits[-1]:
            runs.append([])
        runs[-1].append(size)
        fits.append(measure())
    while len(runs) > 1 and not measure():
        last = runs.pop()
        runs[-1] += last
    return [len(run) for run in runs]


# Multiples of 256, so that tensors that are merged have no gap between them.
SIZES = st.lists(st.integers(0, 40).map(lambda n: 256 * n), min_size=1, max_size=24)


@given(
    sizes=SIZES,
    granule=st.sampled_from([256, 1024, 2048, 4096]),
    max_padding=st.sampled_from([0.0, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0]),
)
def test_layers_are_merged_as_the_plain_model_merges_them(
    sizes: Sequence[int], granule: int, max_padding: float
) -> None:
    layout = laid_out(sizes, granule, max_padding)
    assert [len(layer.tensors) for layer in layout.layers] == plain(sizes, granule, max_padding)
    assert [spec.name for layer in layout.layers for spec in layer.tensors] == [
        f"h.{number}.w" for number in range(len(sizes))
    ]
    if len(layout) > 1:
        for layer in layout.layers:
            assert padding(layer.nbytes, granule) <= Fraction(max_padding)


@pytest.mark.parametrize(
    ("max_padding", "names"),
    [
        (1.0, ["h.0", "h.1", "h.2", "h.3"]),
        (0.25, ["h.0 to h.1", "h.2", "h.3"]),
        (0.0, ["h.0 to h.3"]),
    ],
)
def test_a_merged_layer_has_the_names_of_its_first_and_last_parts(
    max_padding: float, names: list[str]
) -> None:
    layout = laid_out([512, 1024, 1536, 2048], 2048, max_padding)
    assert [layer.name for layer in layout.layers] == names


def test_the_last_layers_join_those_before_them() -> None:
    layout = laid_out([2048, 2048, 2048, 2048, 256], 2048, 0.3)
    assert [layer.name for layer in layout.layers] == ["h.0", "h.1", "h.2 to h.4"]


@pytest.mark.parametrize("grouping", [[["h.0.w"], ["h.1.w"]], {"a": ["h.0.w"], "b": ["h.1.w"]}])
def test_layers_of_the_caller_are_not_merged(
    tmp_path: Path, grouping: Sequence[Sequence[str]] | Mapping[str, Sequence[str]]
) -> None:
    path = write_blocks(tmp_path / "m.safetensors", [256, 256])
    with closing(open_checkpoint(path)) as opened:
        layout = build_layout(opened, grouping, granule=2048, max_padding=0.05)
    assert len(layout) == 2


def merged(device: Device, tmp_path: Path) -> tuple[Runtime, Model]:
    """Return a model of 24 blocks, of which twelve fill a granule, with its runtime."""
    path = write_blocks(tmp_path / "m.safetensors", [2 * MIB // 12 // 256 * 256] * 24)
    runtime = device.runtime(arena="4MiB", max_padding=0.05)
    return runtime, runtime.register("m", path)


def test_merged_layers_share_granules(device: Device, tmp_path: Path) -> None:
    runtime, model = merged(device, tmp_path)
    runtime.prewarm(model).wait()
    assert runtime.snapshot().granules_free == 0
    assert [layer.name for layer in model.layers] == ["h.0 to h.11", "h.12 to h.23"]
    for number in (0, 11, 12, 23):
        read = bytes_of(runtime, model, f"h.{number}.w")
        assert read == bytes([number]) * len(read)


def test_reloading_merges_the_same_layers(device: Device, tmp_path: Path) -> None:
    runtime, model = merged(device, tmp_path)
    before = [layer.name for layer in model.layers]
    runtime.reload("m")
    assert [layer.name for layer in runtime.model("m").layers] == before


def test_layers_are_merged_on_cuda_alone_unless_the_caller_asks(
    device: Device, tmp_path: Path
) -> None:
    path = write_blocks(tmp_path / "m.safetensors", [2 * MIB] * 8)
    runtime = device.runtime(arena="32MiB", granule=None, max_padding=None)
    model = runtime.register("m", path)
    granule = runtime.snapshot().granule_bytes
    assert (granule, len(model.layers)) == ((16 * MIB, 1) if device.cuda else (2 * MIB, 8))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_its_range_is_refused(device: Device, share: float) -> None:
    with pytest.raises(ValueError, match=r"max_padding must be in \[0, 1\]"):
        device.runtime(max_padding=share)
