"""Open and check safetensors checkpoints: which bytes of which file hold which tensor.

A checkpoint is an untrusted file: everything in it is checked before it is used. An error in it
raises a plain ValueError in `header` and `files`. `blaming` turns it into a CorruptCheckpoint that
names the file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from warmserve_rt import _native
from warmserve_rt._errors import CorruptCheckpoint

from . import hub, mistaken
from .choice import choose
from .directory import Directory
from .files import (
    CheckpointFile,
    FileIdentity,
    blaming,
    is_directory,
    naming,
    open_path,
    reader,
    shown,
)
from .header import (
    CHUNK,
    DTYPES,
    LIMIT,
    TYPES,
    DType,
    DuplicateTensor,
    TensorEntry,
    Tensors,
    parse_object,
    read_header,
    strings,
)

__all__ = [
    "CHUNK",
    "DTYPES",
    "TYPES",
    "Checkpoint",
    "CheckpointFile",
    "DType",
    "FileIdentity",
    "Source",
    "TensorEntry",
    "Tensors",
    "open_checkpoint",
    "shown",
]

Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Source: TypeAlias = Path | Sequence[Path]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Open files and the tensors in them, ordered by file and then by offset."""

    files: tuple[CheckpointFile, ...]
    tensors: Tensors

    def close(self) -> None:
        """Close every file. Idempotent."""
        for file in self.files:
            file.close()


def open_checkpoint(
    source: Source,
    *,
    allow_symlinks: bool = False,
    variant: str | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Open a checkpoint and check all of it except the tensors' values.

    Parameters
    ----------
    source : path, sequence of paths, or id
        A safetensors file, a list of them, a directory, or the id of a model in the Hugging Face
        cache ("org/name"). A path that exists is never taken for an id. A path of the caller is
        followed wherever it leads. The files of a directory are chosen as transformers and vLLM
        choose them (see `choice`).
    allow_symlinks : bool
        Follow symbolic links that leave the directory. Links from a snapshot of the Hugging Face
        cache into its own blobs are always followed.
    variant : str, optional
        "fp16" chooses model.fp16.safetensors, or another file of that variant, in a directory.
    revision : str, optional
        The revision of an id. Default: "main".

    Raises
    ------
    CorruptCheckpoint
        Names the file and what is wrong in it. Index and files must agree: a tensor that a file
        holds and the index omits is refused too, although other readers ignore it, because one of
        the two is not what its author meant.
    FileNotFoundError
        `source` does not exist, or is a directory without a model.
    ValueError
        `source` is an empty list, or an option does not apply to it.
    TypeError
        `source` is not a path.
    OSError
        The system refuses to read a file.

    After an exception no file stays open.
    """
    with ExitStack() as folder:
        candidates, index = _candidates(folder, source, allow_symlinks, variant, revision)
        return _open_all(candidates, index)


# The path of each file, and a function that opens it.
_Candidates: TypeAlias = list[tuple[str, Callable[[], io.BufferedReader]]]


def _candidates(
    folder: ExitStack,
    source: Source,
    allow_symlinks: bool,
    variant: str | None,
    revision: str | None,
) -> tuple[_Candidates, dict[str, str]]:
    """Return the files of a checkpoint, and the path of each tensor if it has an index. A directory
    stays open in `folder`."""
    if isinstance(source, str | bytes | os.PathLike):
        path, fd = _open_source(_checked(source), revision, isinstance(source, str))
        if is_directory(fd):
            directory = folder.enter_context(Directory(path, fd, allow_symlinks=allow_symlinks))
            return _files_of(directory, variant)
        if variant is None:
            return [(path, partial(reader, fd))], {}
        os.close(fd)
    elif isinstance(source, Sequence) and not isinstance(source, bytearray | memoryview):
        paths = [_checked(path) for path in source]
        if not paths:
            raise ValueError("a checkpoint needs at least one file")
        if revision is not None:
            raise ValueError("revision= is for the id of a model in the Hugging Face cache")
        if variant is None:
            return [(path, partial(_open_named, path)) for path in paths], {}
    else:
        raise TypeError(
            f"checkpoint must be a path or a list of paths, got {type(source).__name__}"
        )
    raise ValueError("variant= is for a directory or the id of a model, not for files")


def _checked(path: object) -> str:
    """Return a path as a string. Raises TypeError or ValueError."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"a file of a checkpoint must be a path, got {type(path).__name__}")
    decoded: str = os.fsdecode(path)
    if "\0" in decoded:
        raise ValueError(f"a path must not contain a NUL character, got {decoded!r}")
    return decoded


def _open_source(path: str, revision: str | None, may_be_id: bool) -> tuple[str, int]:
    """Open a path, or else the folder of a model in the Hugging Face cache. Return the path and the
    descriptor."""
    try:
        with blaming(path), naming(path):
            fd = open_path(path)
    except FileNotFoundError:
        if not (may_be_id and hub.is_id(path)):
            raise
        path = hub.snapshot_of(path, revision)
        with blaming(path), naming(path):
            return path, open_path(path)
    if revision is not None:
        os.close(fd)
        raise ValueError(
            f"revision= is for the id of a model in the Hugging Face cache, and {path!r} is a path"
        )
    return path, fd


def _open_named(path: str) -> io.BufferedReader:
    with naming(path):
        return reader(open_path(path))


def _files_of(directory: Directory, variant: str | None) -> tuple[_Candidates, dict[str, str]]:
    names = directory.names()
    if variant is not None and not isinstance(variant, str):
        raise TypeError(f"variant must be a string such as 'fp16', got {type(variant).__name__}")
    try:
        with blaming(directory.path):
            index_name, files = choose(names, variant)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{shown(directory.path)}: {error}") from None
    index: dict[str, str] = {}
    if index_name is not None:
        path = directory.path_of(index_name)
        with blaming(path), directory.open(index_name) as file:
            parsed = parse_object(file.read(LIMIT + 1))  # one byte more, to detect excess
            weight_map = strings("weight_map", parsed.get("weight_map"))
            if not weight_map:
                raise ValueError("weight_map is empty")
        index = {tensor: directory.path_of(shard) for tensor, shard in weight_map.items()}
        files = sorted(set(weight_map.values()))
    if not files:
        hint = mistaken.directory_has(names)
        if folders := directory.folders_with(".safetensors"):
            hint += f"; these folders have some: {', '.join(folders[:5])}"
        raise FileNotFoundError(
            f"{shown(directory.path)}: no *.safetensors in this directory{hint}"
        )
    blamed = directory.path if index_name is None else directory.path_of(index_name)

    def opener(name: str) -> io.BufferedReader:
        with blaming(blamed):
            return directory.open(name)

    return [(directory.path_of(name), partial(opener, name)) for name in files], index


def _open_all(candidates: _Candidates, index: Mapping[str, str]) -> Checkpoint:
    files: list[CheckpointFile] = []
    tensors = Tensors(_native.TensorTable())
    with ExitStack() as opened:
        for path, opener in candidates:
            first = len(tensors)
            with blaming(path):
                try:
                    file = _open_file(path, opener, tensors.native)
                except DuplicateTensor as error:
                    raise ValueError(f"{error} {shown(files[error.file].path)}") from None
                files.append(opened.enter_context(file))
                for name in tensors.names(first) if index else ():
                    if index.get(name) != path:
                        raise ValueError(f"the index does not assign tensor {name!r} to this file")
        if index and len(index) != len(tensors):
            name = min(index.keys() - tensors.keys())
            raise CorruptCheckpoint(
                f"{shown(index[name])}: no tensor {name!r}, but the index assigns it to this file"
            )
        opened.pop_all()
    return Checkpoint(tuple(files), tensors)


def _open_file(
    path: str, opener: Callable[[], io.BufferedReader], tensors: _native.TensorTable
) -> CheckpointFile:
    """Open the next file of a checkpoint and add its tensors."""
    with ExitStack() as opened:
        file = opened.enter_context(opener())
        identity = FileIdentity.of(file.fileno())
        try:
            metadata = read_header(file, identity.size, tensors)
        except DuplicateTensor:
            raise
        except ValueError as error:
            if what := mistaken.file_is(file.fileno(), path):
                raise ValueError(f"{what} (as safetensors: {error})") from error
            raise
        if FileIdentity.of(file.fileno()) != identity:
            raise ValueError("changed while its header was read")
        opened.pop_all()
    return CheckpointFile(path, identity, metadata, file)
