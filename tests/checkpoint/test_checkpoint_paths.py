"""Risk: for an unusual path, a system limit or a file of another kind, the error names the wrong
cause."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import os
import pickle
import resource
import signal
import struct
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_files import opened, write

from warmserve_rt import CorruptCheckpoint, Runtime
from warmserve_rt.checkpoint import files, open_checkpoint

SETLEASE = 1024  # F_SETLEASE, which fcntl defines only from Python 3.9 on some systems


def bytes_of(path: Path) -> bytes:
    return os.fsencode(path)


class BytesPath:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return bytes_of(self.path)


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"\x1b[31m", "\u202e".encode(), b"ok"])
@pytest.mark.parametrize("directory", [False, True])
def test_a_path_of_any_bytes_is_opened_and_shown_on_one_line(
    tmp_path: Path, name: bytes, directory: bool
) -> None:
    folder = Path(os.fsdecode(os.path.join(bytes_of(tmp_path), name)))
    path = write(folder / "model.safetensors", "t")
    source = folder if directory else path
    with Runtime(arena="4MiB", tensors="numpy") as runtime:
        runtime.register("m", source)
        os.utime(path, (1, 1))
        with pytest.raises(CorruptCheckpoint) as native:
            runtime.prewarm("m").wait(30)
    path.write_bytes(b"")
    with pytest.raises(CorruptCheckpoint) as ours:
        open_checkpoint(source)
    for message in (str(native.value), str(ours.value)):
        assert message.isprintable()
        assert message.isascii() or name.isascii() is False
        message.encode()


def test_paths_may_be_strings_bytes_and_path_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "t")
    link = f"/proc/self/fd/{(held := path.open()).fileno()}"
    sources: list[Any] = [str(path), bytes_of(path), BytesPath(path), [path], (bytes_of(path),),
                          tmp_path, bytes_of(tmp_path), BytesPath(tmp_path), link]  # fmt: skip
    for source in sources:
        assert opened(source) == ["t"]
    held.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "checkpoint must be a path or a list of paths, got int"),
        (None, "checkpoint must be a path or a list of paths, got NoneType"),
        ({"a": "b"}, "checkpoint must be a path or a list of paths, got dict"),
        (bytearray(b"a"), "checkpoint must be a path or a list of paths, got bytearray"),
        ([3], "a file of a checkpoint must be a path, got int"),
        ([["a"]], "a file of a checkpoint must be a path, got list"),
    ],
)
def test_a_source_that_is_not_a_path_is_a_type_error(source: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        open_checkpoint(source)


def test_a_nul_in_a_path_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="a path must not contain a NUL character") as caught:
        open_checkpoint("a\0b")
    assert not isinstance(caught.value, CorruptCheckpoint)


def test_an_error_of_the_system_is_not_a_corrupt_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "sub" / "1.safetensors", "t")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"t": "sub/1.safetensors"}}'
    )
    really_open = os.open

    for number, error in ((errno.EACCES, PermissionError), (errno.EIO, OSError)):

        def refusing(name: Any, *args: Any, number: int = number, **options: Any) -> int:
            if str(name).endswith("1.safetensors"):
                raise OSError(number, os.strerror(number), name)
            return really_open(name, *args, **options)

        for source in (path, tmp_path, [path]):
            with monkeypatch.context() as patched:
                patched.setattr(os, "open", refusing)
                with pytest.raises(error) as caught:
                    open_checkpoint(source)
            assert not isinstance(caught.value, ValueError)
            assert caught.value.filename == str(path)


def test_a_name_that_is_too_long_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        open_checkpoint(tmp_path / ("x" * 300))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links"):
        open_checkpoint(loop)


@pytest.mark.parametrize("seconds", [2**33, 15_000_000_000, -(2**31) + 1, 0])
def test_time_stamps_of_any_year_are_compared(tmp_path: Path, seconds: int) -> None:
    path = write(tmp_path / "m.safetensors", "t")
    with Runtime(arena="4MiB", tensors="numpy") as runtime:
        try:
            os.utime(path, ns=(0, seconds * 10**9 + 999_999_999))
        except OSError:
            pytest.skip("the file system cannot store this time stamp")
        runtime.register("m", path)
        runtime.prewarm("m").wait(30)
        runtime.evict("m")
        os.utime(path, ns=(0, seconds * 10**9 + 999_999_998))
        with pytest.raises(CorruptCheckpoint, match="written or touched"):
            runtime.prewarm("m").wait(30)


def open_below(folder: Path) -> int:
    """Return how many files of a folder are open."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of listdir() itself is closed by now
            found += os.readlink(f"/proc/self/fd/{fd}").startswith(f"{folder}/")
    return found


def limit_that_leaves(count: int) -> int:
    """Return the descriptor limit that allows ``count`` more files to be opened."""
    taken = {int(fd) for fd in os.listdir("/proc/self/fd")}
    free = (number for number in itertools.count() if number not in taken)
    return next(itertools.islice(free, count - 1, None)) + 1


def test_a_model_of_many_files_needs_one_descriptor_each(tmp_path: Path) -> None:
    for i in range(200):
        write(tmp_path / f"{i}.safetensors", f"t{i}")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Runtime(arena="4MiB", tensors="numpy") as runtime:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit_that_leaves(100), limit[1]))
            with pytest.raises(OSError, match="ulimit -n"):
                runtime.register("m", tmp_path)
            assert open_below(tmp_path) == 0
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit_that_leaves(210), limit[1]))
            runtime.register("m", tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert open_below(tmp_path) == 200


def test_opening_waits_for_a_file_lease_and_names_it_at_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.safetensors", "t")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    held = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(held, SETLEASE, fcntl.F_WRLCK)
        monkeypatch.setattr(files, "_LEASE_SECONDS", 0.05)
        for source in (path, tmp_path):
            with pytest.raises(BlockingIOError, match="has a lease on this file") as caught:
                open_checkpoint(source)
            assert caught.value.filename == str(path)
        monkeypatch.setattr(files, "_LEASE_SECONDS", 20.0)
        until = time.monotonic() + 0.2
        signal.signal(signal.SIGALRM, lambda *_: fcntl.fcntl(held, SETLEASE, fcntl.F_UNLCK))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert opened(path) == ["t"]
        assert time.monotonic() >= until
    finally:
        os.close(held)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGIO, before)


def zipped(name: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, b"x")
    return made.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
STRANGERS: list[tuple[bytes, str]] = [
    (LFS, r"a Git LFS pointer .* `git lfs pull`"),
    (b"<!DOCTYPE html><html><title>Sign in</title></html>", "an HTML page.*download it again"),
    (b"\n  <html>", "an HTML page"),
    (pickle.dumps({"a": list(range(100))}), "a PyTorch pickle"),
    (zipped("archive/data.pkl"), "a PyTorch pickle"),
    (zipped("a.txt"), "a zip"),
    (b"GGUF\3\0\0\0" + bytes(100), "a GGUF file"),
    (b"\x08\x07\x12\x07pytorch\x1a\x051.0.0" + bytes(100), "an ONNX graph"),
    (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    (b"\x1f\x8b\x08\0" + bytes(range(100)), "an archive"),
    (b"\x93NUMPY\1\0" + bytes(100), "a numpy array"),
    (b"", "an empty file"),
    (bytes(5000), "only zeros at its start"),
    (b'{"error": "Invalid username or password."}', "a JSON text"),
]


@pytest.mark.parametrize("case", STRANGERS, ids=lambda case: case[1])
def test_the_error_for_another_format_names_the_format(
    tmp_path: Path, case: tuple[bytes, str]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(case[0])
    for source in (path, tmp_path):
        with pytest.raises(CorruptCheckpoint, match=f"{path}: {case[1]}"):
            open_checkpoint(source)


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50, 0x120708])
def test_a_header_whose_length_looks_like_another_format_is_read(
    tmp_path: Path, length: int
) -> None:
    path = tmp_path / "m.safetensors"
    header = b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + b"x")
    assert opened(path) == ["t"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"no \*.safetensors .*; pytorch_model.bin is a PyTorch pickle"),
        ("model.gguf", "model.gguf is a GGUF file"),
        ("model.onnx", "model.onnx is an ONNX graph"),
        ("model.safetensors.incomplete", "is a download that has not finished"),
        ("tf_model.h5", "tf_model.h5 is a file of another framework"),
        ("config.json", r"no \*.safetensors in this directory$"),
        ("unet/model.safetensors", r"no \*.safetensors .*; these folders have some: unet"),
    ],
)
def test_the_error_for_a_directory_without_safetensors_lists_its_files(
    tmp_path: Path, name: str, message: str
) -> None:
    write(tmp_path / name, "t")
    with pytest.raises(FileNotFoundError, match=message):
        open_checkpoint(tmp_path)


def test_a_truncated_download_is_reported_as_unfinished(tmp_path: Path) -> None:
    path = write(tmp_path / "blob.incomplete", "t", "u")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptCheckpoint, match=r"download that has not finished.*truncated"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a character device"])
def test_the_error_for_a_file_that_is_not_regular_names_its_kind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(CorruptCheckpoint, match=f"{path}: not a regular file but {kind}"):
        open_checkpoint([path])
