"""Safetensors checkpoints, opened and checked: which bytes of which file hold which tensor.

A checkpoint is a stranger's file: nothing in it is believed unchecked. What is wrong with it is a
plain ValueError in here until `_blaming` makes that a CorruptCheckpoint which names the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from warmserve_rt._errors import CorruptCheckpoint, WarmServeError

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
LIMIT = 100_000_000  # bytes of a header or an index; the format's reference has the same


@dataclass(frozen=True, slots=True)
class DType:
    """One of the format's element types; `bits` is the size of one element."""

    name: str
    bits: int


_NAMES = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "U16 I16 F16 BF16",
    32: "U32 I32 F32",
    64: "U64 I64 F64 C64",
}
DTYPES: Mapping[str, DType] = MappingProxyType(
    {name: DType(name, bits) for bits, names in _NAMES.items() for name in names.split()}
)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must not change in a file while a model uses it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, fd: int) -> FileIdentity:
        """The identity, now, of the file that `fd` has open."""
        now = os.fstat(fd)
        return cls(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes from byte `offset` of file number `file`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointFile:
    """A safetensors file, held open so that replacing it on disk cannot change a model."""

    path: str
    identity: FileIdentity  # when the header was read
    metadata: Mapping[str, str]  # the header's __metadata__
    _file: io.BufferedReader = field(repr=False)

    @property
    def fd(self) -> int:
        """The descriptor, which stays this object's. Raises WarmServeError after `close`."""
        if self._file.closed:
            raise WarmServeError(f"{self.path} was closed")
        return self._file.fileno()

    def close(self) -> None:
        """Close the file; more than once is harmless."""
        self._file.close()

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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
        paths, index = _list_directory(os.fspath(source), allow_symlinks)
    else:
        paths = [os.fspath(source)]

    files: list[CheckpointFile] = []
    tensors: dict[str, TensorEntry] = {}
    with ExitStack() as opened:
        for path in paths:
            file, entries = _open_file(path, len(files))
            files.append(opened.enter_context(file))
            with _blaming(path):
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


@contextmanager
def _blaming(path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: {str(error)[:1000]}") from error  # names may be huge


def _list_directory(directory: str, allow_symlinks: bool) -> tuple[list[str], dict[str, str]]:
    """The paths of a directory's files; and the path of each tensor, if there is an index."""
    names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if "model.safetensors.index.json" in indexes:
        indexes = ["model.safetensors.index.json"]
    shards = [name for name in names if name.endswith(".safetensors")]
    with _blaming(directory):
        if len(indexes) > 1:
            raise ValueError(f"which of these is the index? {', '.join(indexes)}")
        paths = [_path_inside(directory, name, allow_symlinks) for name in indexes or shards]
    if not paths:
        raise FileNotFoundError(f"{directory}: no *.safetensors in this directory")
    if not indexes:
        return paths, {}
    with _blaming(paths[0]), _open_regular(paths[0]) as file:
        index = _parse_object(file.read(LIMIT))  # a longer one is cut, which is no JSON
        weight_map = _strings("weight_map", index.get("weight_map"))
        if not weight_map:
            raise ValueError("weight_map is empty")
        found = {s: _path_inside(directory, s, allow_symlinks) for s in set(weight_map.values())}
    return sorted(found.values()), {tensor: found[shard] for tensor, shard in weight_map.items()}


def _path_inside(directory: str, name: str, allow_symlinks: bool) -> str:
    """The path of an existing file that must not lie outside of the directory."""
    if os.path.isabs(name) or ".." in name.split("/"):
        raise ValueError(f"{name!r} is a path outside the directory")
    path = os.path.join(directory, name)
    try:
        root, real = os.path.realpath(directory), os.path.realpath(path, strict=True)
    except OSError as error:
        raise ValueError(f"{name!r} cannot be opened: {error.strerror}") from error
    if not allow_symlinks and os.path.commonpath([root, real]) != root:
        raise ValueError(f"{name!r} is a symbolic link out of the directory (see allow_symlinks)")
    return path


def _open_regular(path: str) -> io.BufferedReader:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # or a FIFO would block
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("not a regular file")
        os.set_blocking(fd, True)  # for io_uring, which would fail with EAGAIN and not wait
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def _open_file(path: str, number: int) -> tuple[CheckpointFile, list[TensorEntry]]:
    """Open file `number` of a checkpoint; its tensors come ordered by offset."""
    with _blaming(path), ExitStack() as opened:
        file = opened.enter_context(_open_regular(path))
        identity = FileIdentity.of(file.fileno())
        header, start = _read_header(file, identity.size)
        metadata = _strings("__metadata__", header.pop("__metadata__", {}))
        entries = [_entry(name, item, number, start) for name, item in header.items()]
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


def _read_header(file: io.BufferedReader, size: int) -> tuple[dict[str, object], int]:
    """The header of a file of `size` bytes, and the offset where the tensors' bytes start."""
    length = int.from_bytes(file.read(8), "little")
    if length > LIMIT:
        raise ValueError(f"a header of {length} bytes is over the limit of {LIMIT}")
    if length > size - 8:
        raise ValueError(f"truncated: a header of {length} bytes in a file of {size}")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise ValueError("the header is not a JSON object: it does not begin with '{'")
    return _parse_object(raw), 8 + length


def _parse_object(raw: bytes) -> dict[str, object]:
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_unique)
    except UnicodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = Counter(name for name, _ in pairs)
    if len(names) != len(pairs):
        raise ValueError(f"duplicate name {names.most_common(1)[0][0]!r}")
    "".join(names).encode()  # a UnicodeError for an escaped half of a surrogate pair
    return dict(pairs)


def _entry(name: str, item: object, file: int, start: int) -> TensorEntry:
    """One tensor of a header, consistent in itself; `start` is where the data starts."""
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = DTYPES.get(str(item["dtype"])), item["shape"], item["data_offsets"]
    if dtype is None:
        raise ValueError(f"{name!r} has the unknown dtype {item['dtype']!r}")
    for what, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
            raise ValueError(f"{what} of {name!r}: not integers from 0 to 2**63 - 1: {value!r}")
    # Checked for empty tensors too, whose strides must be numbers; no library takes 65 axes.
    if len(shape) > 64 or dtype.bits * math.prod(max(n, 1) for n in shape) >= 2**63:
        raise ValueError(f"the shape of {name!r} overflows: {shape!r}")
    bits = dtype.bits * math.prod(shape)
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != bits:
        raise ValueError(f"data_offsets of {name!r}, {offsets!r}, do not span its {bits} bits")
    return TensorEntry(name, dtype, tuple(shape), file, start + offsets[0], bits // 8)


def _strings(what: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{what} is not an object of strings")
    return value
