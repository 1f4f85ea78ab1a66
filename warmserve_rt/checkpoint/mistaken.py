"""Recognize files that are given as a checkpoint but are not safetensors, and say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable

_CONVERT = "convert it with safetensors.torch.save_file, or download the repository's *.safetensors"
_PICKLE = f"a PyTorch pickle, which could run code when it is read: {_CONVERT}"
_GGUF = "a GGUF file (llama.cpp): download the *.safetensors that it was made from"
_ONNX = "an ONNX graph: download the *.safetensors that it was exported from"
_ARCHIVE = "an archive: unpack it, and give the *.safetensors in it"
_DOWNLOAD = "a download that has not finished: wait for it, or start it again"
_HTML = "an HTML page, such as a login or error page saved in place of the file: download it again"

_ARCHIVES = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"\xfd7zXZ")

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer instead of the file that it refers to: run `git lfs pull`, or download "
        "the file with `hf download`",
    ),
    (b"GGUF", _GGUF),
    *((magic, f"a GGML file (llama.cpp): {_CONVERT}") for magic in (b"lmgg", b"fmgg", b"tjgg")),
    (b"\x89HDF\r\n\x1a\n", f"an HDF5 file (Keras): {_CONVERT}"),
    (b"\x93NUMPY", "a numpy array: save it with safetensors.numpy.save_file"),
    *((magic, _ARCHIVE) for magic in _ARCHIVES),
)
_NAMES = {
    (".bin", ".pt", ".pth", ".ckpt", ".pkl"): _PICKLE,
    (".gguf", ".ggml"): _GGUF,
    (".onnx",): _ONNX,
    (".h5", ".keras", ".msgpack", ".tflite", ".npz"): f"a file of another framework: {_CONVERT}",
    (".incomplete", ".part", ".crdownload", ".aria2"): _DOWNLOAD,
}


def file_is(fd: int, name: str) -> str | None:
    """Return what a file that is not safetensors seems to be and what to do, or None."""
    start = os.pread(fd, 1024, 0)
    if not start:
        return "an empty file: the download failed, or a link to it was not followed"
    for magic, what in _MAGIC:
        if start.startswith(magic):
            return what
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return _HTML
    if start[:1] == b"\x80" and 2 <= start[1] <= 5:
        return _PICKLE
    if start.startswith(b"PK\x03\x04"):
        return _PICKLE if b"data.pkl" in start else f"a zip: {_ARCHIVE}"
    if start[257:262] == b"ustar":
        return _ARCHIVE
    if start[4:8] == b"TFL3":
        return f"a TensorFlow Lite model: {_CONVERT}"
    if start[:1] == b"\x08" and start[1] < 32 and start[2:3] in (b"\x12", b"\x3a"):
        return _ONNX
    if not any(start):
        return f"only zeros at its start: {_DOWNLOAD}"
    if text.startswith((b"{", b"[")):
        return (
            "a JSON text instead of safetensors: give the *.safetensors beside it, or the directory"
        )
    return name_is(name)


def name_is(name: str) -> str | None:
    """Return what a file with that name usually is and what to do, or None."""
    for endings, what in _NAMES.items():
        if name.lower().endswith(endings):
            return what
    return None


def directory_has(names: Iterable[str]) -> str:
    """Return a hint for a directory without safetensors: the first name of a known kind."""
    for name in sorted(names):
        if what := name_is(name):
            return f"; {name} is {what}"
    return ""
