"""Risk: after its checkpoint changes, a model serves mixed bytes, or can never be used again."""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_model, write_safetensors

from warmserve_rt import FOREGROUND, Busy, CorruptCheckpoint, Runtime, testing
from warmserve_rt.kernels import granule_digest

SIZES = [5 * GRANULE + 3, 7, GRANULE]


@pytest.fixture(params=["host", "staged", "cuda"])
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """Yield a runtime on one of three devices, filled by the CPU or by staged copies.

    A chunk is half a granule.
    """
    options: dict[str, Any] = {
        "arena": "32MiB",
        "granule": GRANULE,
        "max_padding": 1,
        "tensors": "numpy",
        "chunk": "1MiB",
        "loaders": 2,
    }
    if request.param == "cuda":
        with testing.simulated_cuda(memory="1GiB") as cuda:
            options |= {"driver": testing.cuda_driver(cuda), "tensors": "dlpack"}
            with Runtime(**options) as made:
                yield made
        return
    if request.param == "staged":
        from warmserve_rt import _native

        options["driver"] = _native.host_driver(host_view=False)
    with Runtime(**options) as made:
        yield made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.safetensors", "m", SIZES)


def load(runtime: Runtime, name: str = "m") -> list[bytes]:
    runtime.prewarm(name).wait(30)
    return [runtime.read_back(name, i).tobytes() for i in range(len(runtime.model(name).layers))]


def addresses(runtime: Runtime, name: str = "m") -> dict[str, int]:
    with runtime.lease(name) as lease:
        tensors: dict[str, Any] = dict(lease.tensors)
        return {
            key: tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.address
            for key, tensor in tensors.items()
        }


CONTENT = [content("m", i, nbytes) for i, nbytes in enumerate(SIZES)]


def hard_link(path: Path) -> None:
    os.link(path, path.with_name("link"))


def attribute(path: Path) -> None:
    os.setxattr(path, b"user.note", b"x")


HARMLESS: list[Callable[[Path], object]] = [
    hard_link,
    attribute,
    lambda path: path.chmod(0o600),
    lambda path: path.rename(path.with_name("renamed")),
    lambda path: path.unlink(),
    lambda path: os.replace(shutil.copy(path, path.with_name("copy")), path),
]  # fmt: skip
HARMLESS_IDS = ["link", "xattr", "chmod", "rename", "unlink", "replace"]


@pytest.mark.parametrize("change", HARMLESS, ids=HARMLESS_IDS)
def test_a_change_of_names_or_attributes_is_refused_until_reload(
    path: Path, change: Callable[[Path], object]
) -> None:
    with Runtime(arena="32MiB", tensors="numpy") as runtime:
        model = runtime.register("m", path)
        change(path)
        with pytest.raises(
            CorruptCheckpoint, match=r"changed since .*: it(s name)? was .*Runtime.reload\(\)"
        ):
            runtime.prewarm("m").wait(30)
        if not path.exists():
            with pytest.raises(FileNotFoundError):
                runtime.reload("m")
            write_model(path, "m", SIZES)
        runtime.reload(model)
        assert load(runtime) == CONTENT


@pytest.mark.parametrize("verify", ["sampled", "full"])
@pytest.mark.parametrize("change", HARMLESS, ids=HARMLESS_IDS)
def test_matching_digests_allow_a_change_of_names_or_attributes(
    path: Path, change: Callable[[Path], object], verify: Any
) -> None:
    with Runtime(arena="32MiB", tensors="numpy") as runtime:
        runtime.register("m", path, verify=verify)
        change(path)
        assert load(runtime) == CONTENT


@pytest.mark.parametrize("verify", [None, "full"])
def test_a_write_or_a_touch_is_refused_until_reload(path: Path, verify: Any) -> None:
    with Runtime(arena="32MiB", tensors="numpy") as runtime:
        runtime.register("m", path, verify=verify)
        os.utime(path)
        with pytest.raises(CorruptCheckpoint, match=r"written or touched; Runtime.reload\(\)"):
            runtime.prewarm("m").wait(30)
        with path.open("ab") as file:
            file.write(b"x")
        size = path.stat().st_size
        with pytest.raises(CorruptCheckpoint, match=f"its size is {size} and was {size - 1}"):
            runtime.prewarm("m").wait(30)
        with pytest.raises(CorruptCheckpoint, match="belong to no tensor"):
            runtime.reload("m")


def write_unseen(path: Path, offset: int, data: bytes) -> None:
    """Write to a file and restore its time stamps."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_digest_finds_a_change_that_no_time_stamp_shows(runtime: Runtime, path: Path) -> None:
    runtime.register("m", path, verify="full")
    assert load(runtime) == CONTENT
    runtime.evict("m")
    at = path.stat().st_size - sum(SIZES) + 3 * GRANULE + 5
    write_unseen(path, at, b"\x01" if CONTENT[0][3 * GRANULE + 5] != 1 else b"\x02")
    with pytest.raises(CorruptCheckpoint, match=r"m.safetensors: granule 3 of layer 0 of 'm'"):
        runtime.prewarm("m").wait(30)
    assert runtime.snapshot().models["m"].layers[0].residency != "resident"
    runtime.evict("m", layers=[0])  # waits until the loader is done with the layer
    assert runtime.snapshot().models["m"].layers[0].residency == "absent"
    for layer in (1, 2):  # the unchanged layers
        runtime.prewarm("m", layers=[layer]).wait(30)
        assert runtime.read_back("m", layer).tobytes() == CONTENT[layer]
    runtime.reload("m")
    changed = load(runtime)
    assert changed[0] != CONTENT[0]
    assert changed[1:] == CONTENT[1:]
    runtime.check_invariants()


def test_a_writer_through_a_mapping_is_found(runtime: Runtime, path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[-1:] = mapped[-1:]  # makes the page dirty
        runtime.register("m", path, verify="sampled")
        mapped[-1:] = bytes([mapped[-1] ^ 1])
        with pytest.raises(CorruptCheckpoint, match="granule 0 of layer 2"):
            runtime.prewarm("m").wait(30)


def test_a_load_that_starts_again_has_new_digests(path: Path) -> None:
    """A half-done load that a more urgent load preempts starts again from its first byte."""
    granules = sum(-(-nbytes // GRANULE) for nbytes in SIZES)
    with Runtime(arena=granules * GRANULE, tensors="numpy", chunk="1MiB", pump=True) as runtime:
        runtime.register("m", path, verify="full")
        runtime.register("urgent", path)
        first = runtime.prewarm("m", layers=[0])
        for _ in range(4):
            assert runtime.step()
        urgent = runtime.prewarm("urgent", priority=FOREGROUND)
        while runtime.step():
            pass
        urgent.wait(0)
        first.wait(0)
        assert load(runtime) == CONTENT


def test_digests_that_the_caller_has_are_compared(runtime: Runtime, path: Path) -> None:
    names = [f"model.layers.{i}" for i in range(len(SIZES))]
    digests = {name: granule_digest(data) for name, data in zip(names, CONTENT, strict=True)}
    assert [layer.name for layer in runtime.register("m", path, digests=digests).layers] == names
    assert load(runtime) == CONTENT
    digests[names[1]] = digests[names[1]] + np.uint64(1)
    runtime.register("other", path, digests=digests)
    with pytest.raises(CorruptCheckpoint, match="granule 0 of layer 1 of 'other'"):
        runtime.prewarm("other").wait(30)
    for wrong, message in (
        ({}, "'model.layers.0' is missing"),
        (digests | {"x": [1]}, "must name layers of the model, got 'x'"),
        (digests | {names[0]: [1]}, "must be 6 integers of 64 bits"),
        (digests | {names[1]: [-1]}, "must be 1 integers of 64 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.register("wrong", path, digests=wrong)
    with pytest.raises(ValueError, match=r'None, "sampled" or "full", got \'fast\''):
        runtime.register("wrong", path, verify="fast")  # type: ignore[arg-type]


def test_digests_are_of_the_cast_bytes(runtime: Runtime, tmp_path: Path) -> None:
    values = np.arange(1_500_001, dtype=np.float32)
    path = write_safetensors(
        tmp_path / "m", {"w": ("F32", [len(values)], values.tobytes()), "b": ("U8", [3], b"abc")}
    )
    runtime.register("m", path, dtype="float16", verify="full")
    runtime.prewarm("m").wait(30)


def test_reload_takes_new_content_at_the_same_addresses(runtime: Runtime, path: Path) -> None:
    model = runtime.register("m", path)
    assert load(runtime) == CONTENT
    before = addresses(runtime)
    write_model(path.with_name("new"), "m", SIZES, revision=1)
    os.replace(path.with_name("new"), path)
    with runtime.lease("m"), pytest.raises(Busy):
        runtime.reload("m", timeout=0)
    assert [runtime.read_back("m", i).tobytes() for i in range(3)] == CONTENT
    runtime.reload("m")
    assert load(runtime) == [content("m", i, nbytes, 1) for i, nbytes in enumerate(SIZES)]
    assert addresses(runtime) == before
    assert runtime.model("m") is model
    runtime.check_invariants()


def test_reload_refuses_another_layout_and_leaves_the_model(path: Path) -> None:
    with Runtime(arena="32MiB", tensors="numpy") as runtime:
        runtime.register("m", path)
        before = len(os.listdir("/proc/self/fd"))
        write_model(path.with_name("new"), "m", [*SIZES, 5])
        (path.with_name("old")).hardlink_to(path)
        os.replace(path.with_name("new"), path)
        with pytest.raises(ValueError, match=r"another layout now: layer 'model.layers.3'"):
            runtime.reload("m")
        path.write_bytes(b"")
        with pytest.raises(CorruptCheckpoint, match="an empty file"):
            runtime.reload("m")
        assert len(os.listdir("/proc/self/fd")) == before
        os.replace(path.with_name("old"), path)
        runtime.reload("m")
        assert load(runtime) == CONTENT
        assert len(os.listdir("/proc/self/fd")) == before


DOCS = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()


def example(name: str) -> str:
    found = re.search(rf"<!-- {name}-example -->\n```python\n(.*?)```", DOCS, re.DOTALL)
    assert found
    return found[1]


def test_the_examples_of_the_guide_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0" * 40
    repo = tmp_path / "cache" / "models--org--name"
    for folder in (repo / "snapshots" / commit, repo / "refs", tmp_path / "model"):
        folder.mkdir(parents=True)
    shutil.copy(path, repo / "snapshots" / commit / "model.safetensors")
    for ref in ("main", "v1.0"):
        (repo / "refs" / ref).write_text(commit)
    for name in ("model", "model.fp16"):
        shutil.copy(path, tmp_path / "model" / f"{name}.safetensors")
    for i in (1, 2):
        write_safetensors(tmp_path / "model" / f"{i}.safetensors", {f"t{i}": ("U8", [1], b"x")})
    monkeypatch.chdir(tmp_path)
    with Runtime(arena="32MiB", tensors="numpy") as runtime:
        exec(example("sources"), {"runtime": runtime})
        exec(example("changes"), {"runtime": runtime, "path": path})
        names = {model.name for model in runtime.models}
        assert names == {"file", "files", "folder", "half", "org/name", "chat", "m"}
        assert load(runtime) == CONTENT
