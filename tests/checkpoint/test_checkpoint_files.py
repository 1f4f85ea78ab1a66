"""Risk: other files of a directory are loaded than the model's, or files outside the directory."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from warmserve_rt import CorruptCheckpoint, Runtime
from warmserve_rt.checkpoint import open_checkpoint
from warmserve_rt.checkpoint.choice import choose

INDEX = "model.safetensors.index.json"


def write(path: Path, *tensors: str) -> Path:
    """Write a file with these tensors, one byte each, and return its path."""
    header = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i, name in enumerate(tensors)
    }
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(len(tensors)))
    return path


def opened(source: object, **options: object) -> list[str]:
    checkpoint = open_checkpoint(source, **options)  # type: ignore[arg-type]
    checkpoint.close()
    return sorted(checkpoint.tensors)


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FP16 = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
OLD_FP16 = ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"]
CONSOLIDATED = [name.replace("model", "consolidated") for name in SHARDS]
UNET = "diffusion_pytorch_model"
# Each case: the names in a directory, the variant, and the model found: an index or files.
CHOICES: list[tuple[Sequence[str], str | None, str | Sequence[str]]] = [
    (["model.safetensors", "consolidated.safetensors"], None, ["model.safetensors"]),
    (["model.safetensors", INDEX, *SHARDS], None, ["model.safetensors"]),
    (["model.safetensors", "a.safetensors.index.json"], None, ["model.safetensors"]),
    (["model.safetensors", "model.fp16.safetensors"], None, ["model.safetensors"]),
    (["model.safetensors", "model.fp16.safetensors"], "fp16", ["model.fp16.safetensors"]),
    ([INDEX, "consolidated.safetensors.index.json", *SHARDS, *CONSOLIDATED], None, INDEX),
    ([INDEX, "adapter_model.safetensors.index.json"], None, INDEX),
    ([INDEX, "model.safetensors.index.fp16.json", *SHARDS, *FP16], None, INDEX),
    ([INDEX, "model.safetensors.index.fp16.json"], "fp16", "model.safetensors.index.fp16.json"),
    (["x.safetensors", "x.safetensors.index.json", "y.safetensors"], None, ["x.safetensors"]),
    (["x.safetensors.index.json", "y.safetensors"], None, "x.safetensors.index.json"),
    (["consolidated.safetensors.index.json"], None, "consolidated.safetensors.index.json"),
    (["consolidated.safetensors.index.json", *SHARDS, "x.safetensors.index.json"], None,
     "x.safetensors.index.json"),
    ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], None, [f"{UNET}.safetensors"]),
    ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], "fp16", [f"{UNET}.fp16.safetensors"]),
    ([*SHARDS, *CONSOLIDATED], None, SHARDS),
    ([*SHARDS, *FP16], None, SHARDS),
    ([*SHARDS, *FP16], "fp16", FP16),
    ([*SHARDS, *OLD_FP16], None, SHARDS),
    ([*SHARDS, *OLD_FP16], "fp16", OLD_FP16),
    ([*SHARDS, "adapter_model.safetensors", "optimizer.safetensors"], None, SHARDS),
    ([*SHARDS, "optimizer_0.safetensors", "scheduler.safetensors"], None, SHARDS),
    (["a.safetensors", "b.safetensors", "pytorch_lora_weights.safetensors"], None,
     ["a.safetensors", "b.safetensors"]),
    (["flux.safetensors", "flux.bf16.safetensors"], None, ["flux.safetensors"]),
    (["layers.safetensors", "layers.0.safetensors"], None,
     ["layers.0.safetensors", "layers.safetensors"]),
    (["layers.0.safetensors", "layers.1.safetensors"], None,
     ["layers.0.safetensors", "layers.1.safetensors"]),
    (CONSOLIDATED, None, CONSOLIDATED),
    (["consolidated.safetensors"], None, ["consolidated.safetensors"]),
    (["model.fp16.safetensors"], None, ["model.fp16.safetensors"]),
    (["m-00000-of-00002.safetensors", "m-00001-of-00002.safetensors"], None,
     ["m-00000-of-00002.safetensors", "m-00001-of-00002.safetensors"]),
    (["qwen2.5-7b.safetensors"], None, ["qwen2.5-7b.safetensors"]),
    (["adaptered.safetensors", "scheduling.safetensors"], None,
     ["adaptered.safetensors", "scheduling.safetensors"]),
    (["config.json"], None, []),
]  # fmt: skip


@pytest.mark.parametrize("case", CHOICES, ids=lambda case: f"{' '.join(case[0])} {case[1]}")
def test_file_names_determine_the_files_of_a_model(
    case: tuple[Sequence[str], str | None, str | Sequence[str]],
) -> None:
    names, variant, wanted = case
    for order in (names, names[::-1]):
        found = choose(order, variant)
        assert found == ((wanted, []) if isinstance(wanted, str) else (None, list(wanted)))


@pytest.mark.parametrize(
    ("names", "variant", "word"),
    [
        (["a.safetensors.index.json", "b.safetensors.index.json"], None, "must have one index"),
        (["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], None,
         "model-00002-of-00003.safetensors is missing"),
        (["model-00001-of-99999999999.safetensors"], None, "model-00002-of-99999999999"),
        ([*SHARDS[:1], *OLD_FP16], None, "model-00002-of-00002.safetensors is missing"),
        (["model.safetensors"], "a/b", "variant must be a word such as 'fp16', got 'a/b'"),
    ],
)  # fmt: skip
def test_ambiguous_file_names_are_refused(names: list[str], variant: str | None, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        choose(names, variant)


@pytest.mark.parametrize(
    ("names", "variant", "word"),
    [
        (["adapter_model.safetensors"], None, "adapter_model.safetensors is an adapter"),
        (["optimizer.safetensors", "scaler.safetensors"], None, "and 1 more"),
        (["model.safetensors", "model.fp16.safetensors"], "bf16", "'bf16' .* it has 'fp16'"),
        (["model.safetensors"], "bf16", "no variant 'bf16' in this directory$"),
    ],
)
def test_the_error_for_a_directory_without_a_model_lists_its_files(
    names: list[str], variant: str | None, word: str
) -> None:
    with pytest.raises(FileNotFoundError, match=word):
        choose(names, variant)


def test_files_beside_a_model_are_not_opened(tmp_path: Path) -> None:
    for beside in ("consolidated", "adapter_model", "optimizer", "model.fp16", "x"):
        (tmp_path / f"{beside}.safetensors").write_bytes(b"no safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    write(tmp_path / "model.safetensors", "t")
    assert opened(tmp_path) == ["t"]
    write(tmp_path / "model.fp16.safetensors", "u")
    assert opened(tmp_path, variant="fp16") == ["u"]
    with Runtime(arena="4MiB", tensors="numpy") as runtime:
        assert list(runtime.register("plain", tmp_path).layout.tensors) == ["t"]
        assert list(runtime.register("half", tmp_path, variant="fp16").layout.tensors) == ["u"]


def test_a_variant_requires_a_directory(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "t")
    before = len(os.listdir("/proc/self/fd"))
    for source in (path, [path]):
        with pytest.raises(ValueError, match="variant= is for a directory"):
            open_checkpoint(source, variant="fp16")
        with pytest.raises(ValueError, match="revision= is for the id"):
            open_checkpoint(source, revision="main")
    assert len(os.listdir("/proc/self/fd")) == before


def snapshot(cache: Path, repo: str = "org/name", commit: str = "0" * 40) -> Path:
    """Write a snapshot as the hub's library lays it out, with one file that holds tensor "t"."""
    root = cache / f"models--{repo.replace('/', '--')}"
    folder = root / "snapshots" / commit
    write(root / "blobs" / f"blob{commit}", "t")
    folder.mkdir(parents=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    (folder / "model.safetensors").symlink_to(f"../../blobs/blob{commit}")
    return folder


def test_links_into_the_blobs_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    assert opened(folder) == ["t"]
    (tmp_path / "link").symlink_to(folder)  # the caller names this link itself
    assert opened(tmp_path / "link") == ["t"]
    root = folder.parent.parent
    write(root / "blobs" / "shard", "u")
    (root / "blobs" / "index").write_text(json.dumps({"weight_map": {"u": "sub/1.safetensors"}}))
    (folder / "model.safetensors").unlink()
    (folder / INDEX).symlink_to("../../blobs/index")
    (folder / "sub").mkdir()
    (folder / "sub" / "1.safetensors").symlink_to("../../../blobs/shard")
    assert opened(folder) == ["u"]
    (folder / "sub" / "model.safetensors").symlink_to(root / "blobs" / "shard")  # absolute target
    assert opened(folder / "sub") == ["u"]


@pytest.mark.parametrize(
    "target",
    ["../../secret", "../../../models--org--other/blobs/x", "../../blobs/../secret", "/etc/passwd",
     "../../refs/x", "../../blobs/link"],
)  # fmt: skip
def test_links_of_a_snapshot_to_anything_but_its_own_blobs_are_refused(
    tmp_path: Path, target: str
) -> None:
    folder = snapshot(tmp_path)
    root = folder.parent.parent
    for path in (root / "secret", root / "refs" / "x", tmp_path / "models--org--other/blobs/x"):
        write(path, "secret")
    (root / "blobs" / "link").symlink_to("../secret")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    with pytest.raises(CorruptCheckpoint, match="symbolic link"):
        open_checkpoint(folder)


def test_a_folder_like_the_cache_is_not_the_cache(tmp_path: Path) -> None:
    write(tmp_path / "x" / "blobs" / "b", "secret")
    folder = tmp_path / "x" / "snapshots" / "y"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to("../../blobs/b")
    with pytest.raises(CorruptCheckpoint, match="symbolic link out of the directory"):
        open_checkpoint(folder)


def test_a_missing_blob_is_reported(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    os.unlink(folder.parent.parent / "blobs" / f"blob{'0' * 40}")
    with pytest.raises(CorruptCheckpoint, match="No such file"):
        open_checkpoint(folder)


def test_an_id_is_found_in_the_cache_and_names_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("the network was used"))
    snapshot(tmp_path, commit="1" * 40)
    folder = snapshot(tmp_path)
    (folder.parent.parent / "refs" / "v1").write_text("1" * 40)
    with Runtime(arena="4MiB", tensors="numpy") as runtime:
        model = runtime.register("org/name")
        assert (model.name, list(model.layout.tensors)) == ("org/name", ["t"])
        assert runtime.register("chat", "org/name", revision="v1").name == "chat"
        assert runtime.register("org/name@v1").revision == "v1"
        for revision in ("2" * 40, "none"):
            with pytest.raises(FileNotFoundError, match=f"hf download org/name --rev.* {revision}"):
                runtime.register("other", "org/name", revision=revision)
        with pytest.raises(FileNotFoundError, match=r"'org/other'.*`hf download org/other`"):
            runtime.register("org/other")


def test_a_path_that_exists_is_not_taken_for_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "org" / "name" / "model.safetensors", "here")
    monkeypatch.chdir(tmp_path)
    assert opened("org/name") == ["here"]
    with pytest.raises(ValueError, match="'org/name' is a path"):
        open_checkpoint("org/name", revision="main")


def test_the_error_for_an_id_names_the_missing_hub_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="install huggingface_hub"):
        open_checkpoint("org/name")
    for path in ("./org/name", "org/name/more", "/org/name", "name.safetensors", Path("org/name")):
        with pytest.raises(FileNotFoundError, match="No such file"):
            open_checkpoint(path)


def test_links_inside_a_directory_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "m" / "a" / "b" / "real", "t")
    (tmp_path / "m" / "to_a").symlink_to("a/b")
    (tmp_path / "m" / "a" / "up").symlink_to("../to_a/./real")
    (tmp_path / "m" / "model.safetensors").symlink_to("a/up")
    assert opened(tmp_path / "m") == ["t"]


@pytest.mark.parametrize(
    "target", ["../secret", "a/../../secret", "a/up/secret", "/proc/self/fd/0", "."]
)
def test_links_out_of_a_directory_are_refused(tmp_path: Path, target: str) -> None:
    write(tmp_path / "secret", "secret")
    (tmp_path / "m" / "a").mkdir(parents=True)
    (tmp_path / "m" / "a" / "up").symlink_to("../..")
    (tmp_path / "m" / "model.safetensors").symlink_to(target)
    with pytest.raises(CorruptCheckpoint, match=r"symbolic link out of|not a regular file"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("what", ["a file", "a shard", "an index", "a folder", "a blob"])
def test_a_link_exchanged_at_any_moment_does_not_lead_out(tmp_path: Path, what: str) -> None:
    """Another process keeps exchanging a name in the directory for a link that leads out of it."""
    inside = tmp_path / "models--a--b" / "snapshots" / "c"
    for folder, secret in ((inside, "inside"), (tmp_path / "out", "secret")):
        write(folder / "sub" / "1.safetensors", secret)
        index = json.dumps({"weight_map": {secret: "sub/1.safetensors"}})
        if what == "a file" or what == "a blob":
            write(folder / "model.safetensors", secret)
        else:
            (folder / INDEX).write_text(index)
    write(inside.parent.parent / "blobs" / "b", "inside")
    name = {"a shard": "sub/1.safetensors", "an index": INDEX, "a folder": "sub"}.get(
        what, "model.safetensors"
    )
    outside = tmp_path / "out" / name
    if what == "an index":  # the index must match the shard inside, or its mismatch is an error
        outside.write_text(json.dumps({"weight_map": {"inside": "sub/1.safetensors"}, "x": 1}))
    spare, here = inside / "spare", inside / name
    if pid := os.fork():
        seen = set()
        try:
            until = time.monotonic() + 1
            while time.monotonic() < until:
                try:
                    with open_checkpoint(inside).files[0] as file:
                        seen.add(os.pread(file.fd, 20, 8).split(b'"')[1])
                except (ValueError, OSError):
                    seen.add(b"refused")
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        assert b"secret" not in seen
        assert b"refused" in seen
    else:
        link = inside.parent / "link"
        while True:
            link.symlink_to("../../blobs/b" if what == "a blob" else outside)
            os.rename(here, spare)
            os.rename(link, here)
            if what == "a blob":  # replaces the link to the blob by a link that leads out
                link.symlink_to(outside)
                os.rename(link, here)
            os.unlink(here)
            os.rename(spare, here)
