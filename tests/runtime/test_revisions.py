"""Risk: a name moves to other weights under a user of the old ones, or to an unregistered model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import content, write_model, write_safetensors
from conftest import Device, bytes_of

from warmserve_rt import Busy, Runtime
from warmserve_rt.core.revisions import parse_name

SIZES = [3 << 20, 1000]
TENSOR = "model.layers.0.weight"


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / str(n), "chat", SIZES, revision=n) for n in range(3)]


@pytest.fixture
def runtime(device: Device) -> Iterator[Runtime]:
    made = device.runtime(arena="32MiB")
    yield made
    made.check_invariants()


def serves(runtime: Runtime, name: str) -> int:
    """Return the revision that a name stands for, found by the bytes under a lease on the name."""
    with runtime.lease(name) as lease:
        found = bytes_of(runtime, lease.models[0], TENSOR)
    return next(n for n in range(3) if found == content("chat", 0, SIZES[0], n))


def test_a_name_means_the_first_revision_until_another_is_promoted(
    runtime: Runtime, paths: list[Path]
) -> None:
    first = runtime.register("chat@1", paths[1])
    second = runtime.register("chat@2", paths[2])
    assert [(m.name, m.revision) for m in runtime.models] == [("chat@1", "1"), ("chat@2", "2")]
    assert runtime.model("chat") is first
    assert [serves(runtime, name) for name in ("chat", "chat@1", "chat@2")] == [1, 1, 2]
    assert runtime.promote("chat@2") is first
    assert runtime.model("chat") is second
    assert [serves(runtime, name) for name in ("chat", "chat@1", "chat@2")] == [2, 1, 2]
    assert runtime.promote(second) is second
    assert runtime.promote(first) is second
    assert runtime.snapshot().models.keys() == {"chat@1", "chat@2"}


def test_leases_on_the_old_revision_stay_valid(runtime: Runtime, paths: list[Path]) -> None:
    old = runtime.register("chat@1", paths[1])
    runtime.register("chat@2", paths[2])
    bound = runtime.tensors("chat")
    with runtime.lease("chat") as lease:
        assert runtime.promote("chat@2") is old
        assert lease.models == (old,)
        assert serves(runtime, "chat") == 2
        with pytest.raises(Busy):
            runtime.unregister(old)
        assert bytes_of(runtime, old, TENSOR) == content("chat", 0, SIZES[0], 1)
        assert bound is old.tensors()
    runtime.unregister("chat@1")
    with pytest.raises(ValueError, match="no model 'chat@1'"):
        runtime.lease("chat@1")
    assert serves(runtime, "chat") == 2


def test_every_operation_resolves_the_name_to_the_promoted_revision(
    runtime: Runtime, paths: list[Path]
) -> None:
    runtime.register("chat@1", paths[1])
    runtime.register("chat@2", paths[2])
    runtime.promote("chat@2")
    runtime.prewarm("chat").wait()
    runtime.set_keep_value("chat", 3.0)
    states = runtime.snapshot().models
    assert [states[name].resident for name in ("chat@1", "chat@2")] == [False, True]
    assert [states[name].layers[0].keep_value for name in ("chat@1", "chat@2")] == [0.0, 3.0]
    runtime.swap(evict="chat", load="chat@1").wait()
    runtime.promote("chat@1")
    assert runtime.read_back("chat", 1).tobytes() == content("chat", 1, SIZES[1], 1)
    runtime.evict("chat")
    assert not any(state.granules for state in runtime.snapshot().models.values())


def test_a_model_without_a_revision_can_be_promoted_by_its_name(
    runtime: Runtime, paths: list[Path]
) -> None:
    plain = runtime.register("chat", paths[0])
    assert (plain.name, plain.revision) == ("chat", None)
    runtime.register("chat@1", paths[1])
    assert serves(runtime, "chat") == 0
    assert runtime.promote("chat@1") is plain
    assert serves(runtime, "chat") == 1
    with runtime.lease(plain):
        assert bytes_of(runtime, plain, TENSOR) == content("chat", 0, SIZES[0], 0)
    assert runtime.promote("chat") is not plain  # "chat" is the full name of the plain model
    assert runtime.model("chat") is plain
    runtime.promote("chat@1")
    runtime.unregister(plain)
    assert serves(runtime, "chat") == 1
    later = runtime.register("chat", paths[2])  # a later plain model is a revision like any other
    assert serves(runtime, "chat") == 1
    runtime.promote(later)
    assert serves(runtime, "chat") == 2


def test_a_name_whose_revision_is_gone_is_unknown(runtime: Runtime, paths: list[Path]) -> None:
    first = runtime.register("chat@1", paths[1])
    runtime.register("chat@2", paths[2])
    runtime.unregister("chat")
    with pytest.raises(ValueError, match="no model 'chat' is registered"):
        runtime.prewarm("chat")
    for gone in (first, "chat@1", "chat"):
        with pytest.raises(ValueError, match="no model"):
            runtime.promote(gone)
    assert runtime.promote("chat@2") is None
    assert serves(runtime, "chat") == 2
    runtime.unregister("chat@2")
    runtime.register("chat@0", paths[0])
    assert serves(runtime, "chat") == 0


@pytest.mark.parametrize("name", ["chat@", "@1", "@", "chat@1@2", "chat@@1"])
def test_invalid_names_are_refused(runtime: Runtime, paths: list[Path], name: str) -> None:
    with pytest.raises(ValueError, match="must be 'name' or 'name@revision', got"):
        runtime.register(name, paths[0])
    assert runtime.models == ()


def test_names_are_parsed() -> None:
    assert parse_name("chat") == ("chat", None)
    assert parse_name("org/chat@2024-01") == ("org/chat", "2024-01")


BASE = {"h.0.a": ("F32", [4, 2]), "h.0.b": ("U8", [3]), "h.1.a": ("F32", [5])}
OTHERS = {
    "a tensor more": (
        {**BASE, "h.1.b": ("U8", [1])},
        "tensor 'h.1.b', U8 [1] at byte 256 instead of nothing more",
    ),
    "a tensor less": (
        {"h.0.a": ("F32", [4, 2]), "h.1.a": ("F32", [5])},
        "layer 'h.1' instead of tensor 'h.0.b', U8 [3] at byte 256",
    ),
    "another name": (
        {"h.0.a": ("F32", [4, 2]), "h.0.c": ("U8", [3]), "h.1.a": ("F32", [5])},
        "tensor 'h.0.c', U8 [3] at byte 256 instead of tensor 'h.0.b', U8 [3] at byte 256",
    ),
    "another shape": (
        {**BASE, "h.0.a": ("F32", [2, 4])},
        "tensor 'h.0.a', F32 [2, 4] at byte 0 instead of tensor 'h.0.a', F32 [4, 2] at byte 0",
    ),
    "another dtype": (
        {**BASE, "h.1.a": ("I32", [5])},
        "tensor 'h.1.a', I32 [5] at byte 0 instead of tensor 'h.1.a', F32 [5] at byte 0",
    ),
    "another order": (
        {"h.0.b": ("U8", [3]), "h.0.a": ("F32", [4, 2]), "h.1.a": ("F32", [5])},
        "tensor 'h.0.b', U8 [3] at byte 0 instead of tensor 'h.0.a', F32 [4, 2] at byte 0",
    ),
    "another layer": (
        {"h.0.a": ("F32", [4, 2]), "h.0.b": ("U8", [3]), "h.2.a": ("F32", [5])},
        "layer 'h.2' instead of layer 'h.1'",
    ),
}


def shaped(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> Path:
    width = {"F32": 4, "I32": 4, "U8": 1, "BF16": 2}
    filled = {}
    for name, (dtype, shape) in tensors.items():
        nbytes = width[dtype]
        for length in shape:
            nbytes *= length
        filled[name] = (dtype, shape, bytes(nbytes))
    return write_safetensors(path, filled)


@pytest.mark.parametrize("how", OTHERS)
def test_revisions_of_another_layout_are_refused(
    runtime: Runtime, tmp_path: Path, how: str
) -> None:
    tensors, message = OTHERS[how]
    runtime.register("chat@1", shaped(tmp_path / "1", BASE))
    with pytest.raises(ValueError, match="must have the layout of") as raised:
        runtime.register("chat@2", shaped(tmp_path / "2", tensors))
    assert str(raised.value) == f"'chat@2' must have the layout of 'chat@1', got {message}"
    assert [model.name for model in runtime.models] == ["chat@1"]
    assert runtime.snapshot().models.keys() == {"chat@1"}
    runtime.register("other@2", tmp_path / "2")  # another name may have another layout
    with pytest.raises(ValueError, match="'chat@1' is registered already"):
        runtime.register("chat@1", tmp_path / "2")
    runtime.unregister("chat@1")
    runtime.register("chat@2", tmp_path / "2")  # no registered revision has the old layout now


def test_revisions_may_differ_in_files_and_stored_dtypes(runtime: Runtime, tmp_path: Path) -> None:
    """Revisions may differ in shards, in metadata, and in dtypes that a cast makes equal."""
    runtime.register("chat@1", shaped(tmp_path / "1", {**BASE, "h.1.a": ("BF16", [5])}))
    head = {name: entry for name, entry in BASE.items() if name != "h.1.a"}
    split = [shaped(tmp_path / "2", head), shaped(tmp_path / "3", {"h.1.a": ("BF16", [5])})]
    runtime.register("chat@2", split)
    layers = {"h.0": [*head], "h.1": ["h.1.a"]}
    floats = {**head, "h.0.a": ("BF16", [4, 2])}
    runtime.register("tuned@1", shaped(tmp_path / "4", {"w": ("BF16", [9])}))
    runtime.register("tuned@2", shaped(tmp_path / "5", {"w": ("F32", [9])}), dtype="bfloat16")
    with pytest.raises(ValueError, match=r"BF16 \[4, 2\] at byte 0 instead of"):
        runtime.register(
            "chat@3",
            [shaped(tmp_path / "6", floats), shaped(tmp_path / "7", {"h.1.a": ("BF16", [5])})],
            layers=layers,
        )


def test_concurrent_promotions_and_lookups_are_consistent(
    runtime: Runtime, paths: list[Path]
) -> None:
    """Each promotion returns the model that another one promoted, and every look-up succeeds."""
    models = [runtime.register(f"chat@{n}", path) for n, path in enumerate(paths)]
    befores: list[object] = []
    stop = threading.Event()

    def promote(model: object) -> None:
        for _ in range(300):
            befores.append(runtime.promote(model))  # type: ignore[arg-type]

    def find() -> None:
        while not stop.is_set():
            assert runtime.model("chat") in models

    threads = [threading.Thread(target=promote, args=(model,)) for model in models]
    finder = threading.Thread(target=find)
    for thread in (finder, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    finder.join()
    chain = [*befores, runtime.model("chat")]
    assert {chain.count(model) for model in models[1:]} == {300}
    assert chain.count(models[0]) == 301


def test_revisions_registered_at_once_have_one_layout(runtime: Runtime, tmp_path: Path) -> None:
    """Registrations with another layout than the first are refused."""
    shapes = [shaped(tmp_path / str(n), {"w": ("U8", [1 + n % 2])}) for n in range(8)]
    refused: list[str] = []

    def register(n: int) -> None:
        try:
            runtime.register(f"chat@{n}", shapes[n])
        except ValueError:
            refused.append(f"chat@{n}")

    threads = [threading.Thread(target=register, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runtime.models) == len(refused) == 4
    assert len({model.nbytes for model in runtime.models}) == 1
