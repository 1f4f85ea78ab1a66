"""Safetensors checkpoints, opened and checked: which bytes of which file hold which tensor.

A checkpoint is a stranger's file: nothing in it is believed unchecked. A mistake in it raises a
plain ValueError in `header` and `files`, which `blaming` turns into a CorruptCheckpoint that names
the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from warmserve_rt import _native
from warmserve_rt._errors import CorruptCheckpoint

from .files import CheckpointFile, FileIdentity, blaming, list_directory, open_regular
from .header import (
    DTYPES,
    TYPES,
    DType,
    DuplicateTensor,
    TensorEntry,
    Tensors,
    read_header,
)

__all__ = [
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
]

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Open files and the tensors in them, ordered by file and then by offset."""

    files: tuple[CheckpointFile, ...]
    tensors: Tensors

    def close(self) -> None:
        """Close every file; more than once is harmless."""
        for file in self.files:
            file.close()


def open_checkpoint(source: Source, *, allow_symlinks: bool = False) -> Checkpoint:
    """Open a checkpoint and check all of it except the tensors' values.

    `source` is a safetensors file, a list of them, or a Hugging Face directory. The directory's
    files are those of its index (`model.safetensors.index.json`, else the only
    `*.safetensors.index.json`) or, without one, every `*.safetensors` in it. Index and files must
    agree: a tensor that a file holds and the index omits is refused too, though other readers
    ignore it, for one of the two is not what its author meant. A symbolic link out of the
    directory is refused unless `allow_symlinks`; snapshots in Hugging Face's own cache consist of
    such links and need it. A path that the caller spells out is followed wherever it leads.

    Raises CorruptCheckpoint, which names the file and what is wrong in it; FileNotFoundError if
    `source` does not exist or is a directory without safetensors; ValueError if it is an empty
    list; OSError if the system refuses to read a file. Nothing stays open then.
    """
    index: dict[str, str] = {}
    if not isinstance(source, str | os.PathLike):
        paths = [os.fspath(path) for path in source]
        if not paths:
            raise ValueError("a checkpoint needs at least one file")
    elif os.path.isdir(source):
        paths, index = list_directory(os.fspath(source), allow_symlinks)
    else:
        paths = [os.fspath(source)]

    files: list[CheckpointFile] = []
    tensors = Tensors(_native.TensorTable())
    with ExitStack() as opened:
        for path in paths:
            first = len(tensors)
            with blaming(path):
                try:
                    file = _open_file(path, tensors.native)
                except DuplicateTensor as error:
                    raise ValueError(f"{error} {files[error.file].path}") from None
                files.append(opened.enter_context(file))
                for name in tensors.names(first) if index else ():
                    if index.get(name) != path:
                        raise ValueError(f"the index does not put tensor {name!r} here")
        if index and len(index) != len(tensors):
            name = min(index.keys() - tensors.keys())
            raise CorruptCheckpoint(f"{index[name]}: no tensor {name!r}, which the index puts here")
        opened.pop_all()
    return Checkpoint(tuple(files), tensors)


def _open_file(path: str, tensors: _native.TensorTable) -> CheckpointFile:
    """Open the next file of a checkpoint and add its tensors."""
    with ExitStack() as opened:
        file = opened.enter_context(open_regular(path))
        identity = FileIdentity.of(file.fileno())
        metadata = read_header(file, identity.size, tensors)
        if FileIdentity.of(file.fileno()) != identity:
            raise ValueError("changed while its header was read")
        opened.pop_all()
    return CheckpointFile(path, identity, metadata, file)
