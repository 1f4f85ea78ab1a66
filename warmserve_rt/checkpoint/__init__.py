"""Safetensors checkpoints, opened and checked: which bytes of which file hold which tensor.

A checkpoint is a stranger's file: nothing in it is believed unchecked. A mistake in it raises a
plain ValueError in `header` and `files`, which `blaming` turns into a CorruptCheckpoint that names
the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from warmserve_rt._errors import CorruptCheckpoint

from .files import CheckpointFile, FileIdentity, blaming, list_directory, open_regular
from .header import DTYPES, DType, TensorEntry, entry_of, read_header, strings

__all__ = [
    "DTYPES",
    "Checkpoint",
    "CheckpointFile",
    "DType",
    "FileIdentity",
    "Source",
    "TensorEntry",
    "open_checkpoint",
]

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Open files and the tensors in them, ordered by file and then by offset."""

    files: tuple[CheckpointFile, ...]
    tensors: Mapping[str, TensorEntry]

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
    tensors: dict[str, TensorEntry] = {}
    with ExitStack() as opened:
        for path in paths:
            file, entries = _open_file(path, len(files))
            files.append(opened.enter_context(file))
            with blaming(path):
                for entry in entries:
                    if index and index.get(entry.name) != path:
                        raise ValueError(f"the index does not put tensor {entry.name!r} here")
                    if (other := tensors.setdefault(entry.name, entry)) is not entry:
                        raise ValueError(f"{entry.name!r} is also in {files[other.file].path}")
        if absent := sorted(index.keys() - tensors.keys()):
            name = absent[0]
            raise CorruptCheckpoint(f"{index[name]}: no tensor {name!r}, which the index puts here")
        opened.pop_all()
    return Checkpoint(tuple(files), MappingProxyType(tensors))


def _open_file(path: str, number: int) -> tuple[CheckpointFile, list[TensorEntry]]:
    """Open file `number` of a checkpoint; its tensors come ordered by offset."""
    with blaming(path), ExitStack() as opened:
        file = opened.enter_context(open_regular(path))
        identity = FileIdentity.of(file.fileno())
        header, start = read_header(file, identity.size)
        metadata = strings("__metadata__", header.pop("__metadata__", {}))
        entries = [entry_of(name, item, number, start) for name, item in header.items()]
        entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
        end = start
        for entry in entries:
            if entry.offset != end:
                what = "overlaps the tensor" if entry.offset < end else "leaves a hole"
                raise ValueError(f"{entry.name!r} at byte {entry.offset} {what} before it")
            end += entry.nbytes
        if end != identity.size:
            what = "truncated" if end > identity.size else "bytes that belong to no tensor"
            raise ValueError(f"{what}: tensors end at byte {end}, the file at {identity.size}")
        if FileIdentity.of(file.fileno()) != identity:
            raise ValueError("changed while its header was read")
        opened.pop_all()
    return CheckpointFile(path, identity, MappingProxyType(metadata), file), entries
