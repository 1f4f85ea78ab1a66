"""Risk: a small hostile file costs minutes, or the cost of choosing layers is quadratic in their
number."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import header_fuzz
import numpy as np
import pytest

from warmserve_rt import Model, Runtime
from warmserve_rt._errors import CorruptCheckpoint
from warmserve_rt.checkpoint import CHUNK, DTYPES, TensorEntry, open_checkpoint
from warmserve_rt.checkpoint.dtypes import planned_casts
from warmserve_rt.checkpoint.layout import build_layout
from warmserve_rt.core.selection import layer_index, layer_indices

ENTRY = '"%s":{"dtype":"%s","shape":[0],"data_offsets":[0,0]}'


def write(path: Path, names: list[str]) -> Path:
    """Write a file of empty tensors and return its path."""
    raw = ("{" + ",".join(ENTRY % (name, "U8") for name in names) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    return path


def operations(work: Callable[[], object]) -> int:
    """Count the calls and returns, of Python and of C functions, that the work makes."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.fixture
def models(tmp_path: Path) -> Any:
    with Runtime(arena="2MiB", tensors="numpy") as runtime:
        yield [
            runtime.register(str(n), write(tmp_path / f"{n}", [f"l.{i}.w" for i in range(n)]))
            for n in (500, 1000)
        ]


@pytest.mark.parametrize(
    "work",
    [
        lambda model: layer_indices(model, range(len(model.layers))),
        lambda model: layer_indices(model, [layer.name for layer in model.layers]),
        lambda model: [layer_index(model, layer.name) for layer in model.layers],
        lambda model: model.tensors(),
    ],
    ids=["by index", "by name", "one by one", "tensors"],
)
def test_twice_the_layers_cost_twice_the_operations(
    models: list[Model], work: Callable[[Model], object]
) -> None:
    for model in models:
        work(model)  # builds the caches that are built once
    small, large = (operations(lambda m=model: work(m)) for model in models)
    assert large <= 2.2 * small + 50


def write_metadata(path: Path, members: list[str]) -> Path:
    raw = ('{"__metadata__":{' + ",".join(members) + "}}").encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    return path


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 12_287, 12_288, 50_000])
def test_every_metadata_entry_is_found_among_many(tmp_path: Path, count: int) -> None:
    members = [f'"k{i}":"{i}"' for i in range(count)]
    with closing(open_checkpoint(write_metadata(tmp_path / "f", members))) as checkpoint:
        found = checkpoint.files[0].metadata
        assert [found[f"k{i}"] for i in range(count)] == [str(i) for i in range(count)]
        assert len(found) == count
        assert f"k{count}" not in found


@pytest.mark.parametrize("first", [0, 1, 25_000, 49_983, 49_999])
def test_a_duplicate_name_among_many_metadata_entries_is_refused(
    tmp_path: Path, first: int
) -> None:
    members = [f'"k{i}":""' for i in [*range(50_000), first]]
    with pytest.raises(CorruptCheckpoint, match=f"duplicate name 'k{first}'"):
        open_checkpoint(write_metadata(tmp_path / "f", members))


def test_a_layer_with_many_tensors_lists_them_as_a_sequence(tmp_path: Path) -> None:
    names = [f"h.0.{i:05}" for i in range(2 * CHUNK + 1)]
    with Runtime(arena="2MiB", tensors="numpy") as runtime:
        model = runtime.register("m", write(tmp_path / "f", names))
        (layer,) = model.layers
        tensors = layer.tensors
        assert [tensor.name for tensor in tensors] == names
        assert len(tensors) == len(names)
        assert [tensors[i].name for i in (0, -1, CHUNK)] == [names[i] for i in (0, -1, CHUNK)]
        assert [tensor.name for tensor in tensors[CHUNK - 1 : CHUNK + 1]] == names[
            CHUNK - 1 : CHUNK + 1
        ]
        assert tensors == tuple(tensors)
        assert hash(tensors) == hash(tuple(tensors))
        assert tensors != tuple(tensors)[1:]
        assert list(model.tensors("torch")) == names
        for wrong in (len(names), -len(names) - 1):
            with pytest.raises(IndexError):
                tensors[wrong]


def test_names_of_a_million_dots_are_laid_out(tmp_path: Path) -> None:
    dots = "a." * 1_000_000
    names = [dots, dots + "0.w", "b" + dots + "1.w", "b" + dots]
    with closing(open_checkpoint(write(tmp_path / "f", names))) as checkpoint:
        layout = build_layout(checkpoint)
    assert sorted(layer.name for layer in layout.layers) == sorted(
        ["head", dots + "0", "b" + dots + "1"]
    )


def test_casts_of_names_of_a_million_dots_are_planned() -> None:
    dots = ".".join("a" * 1_000_000)
    found = {"a": "U8", dots: "F32", "x.b": "F32", "ab.c": "F32"}
    tensors = {name: TensorEntry(name, DTYPES[of], (), 0, 0, 0) for name, of in found.items()}
    assert set(planned_casts(tensors, "bfloat16")) == {"x.b", "ab.c"}


def test_numpy_integers_can_name_layers(models: list[Model]) -> None:
    model = models[0]
    assert layer_indices(model, np.int64(2)) == [0, 1]  # type: ignore[arg-type]
    assert layer_indices(model, np.array([3, 1])) == [1, 3]
    assert layer_index(model, np.uint8(4)) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layers", [[1.5], 1.5, [True], True, [None], "l.0", np.float32(1), [np.True_]]
)
def test_a_layer_argument_of_a_wrong_type_is_refused(models: list[Model], layers: Any) -> None:
    with pytest.raises(TypeError, match="got"):
        layer_indices(models[0], layers)


def test_repeated_layer_is_refused_by_name(models: list[Model]) -> None:
    with pytest.raises(ValueError, match=r"'l.3' .* named twice"):
        layer_indices(models[0], [3, "l.3"])


def test_mutated_headers_are_read_as_the_format_says_or_refused() -> None:
    assert 200 < header_fuzz.fuzz(3000, seed=2) < 2800
