"""Read the headers of safetensors files and the index beside them.

Native code reads and checks them without the interpreter's lock, and keeps compact tables. Python
objects are made one by one on access, because a header of 90 MB has 1.6 million tensors.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from warmserve_rt import _native

LIMIT = 100_000_000  # bytes of a header or an index, as in the reference implementation
MOST_NAMES = 1 << 21  # names in an index: more than a header of LIMIT bytes can have
CHUNK = 4096  # rows of a native table made per call, which holds the interpreter's lock


@dataclass(frozen=True, slots=True)
class DType:
    """One of the format's element types; `bits` is the size of one element."""

    name: str
    bits: int


DTYPES: Mapping[str, DType] = MappingProxyType(
    {name: DType(name, bits) for name, bits in _native.element_types()}
)
TYPES = tuple(DTYPES.values())  # by native type number


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of one tensor: `nbytes` bytes from byte `offset` of file number `file`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


class Tensors(Mapping[str, TensorEntry]):
    """The tensors of a checkpoint's files, ordered by file and then by offset."""

    __slots__ = ("native",)

    def __init__(self, native: _native.TensorTable) -> None:
        self.native = native

    def __getitem__(self, name: str) -> TensorEntry:
        number = self.native.find(name) if isinstance(name, str) else None
        if number is None:
            raise KeyError(name)
        _, dtype, shape, file, offset, nbytes = self.native.entry(number)
        return TensorEntry(name, TYPES[dtype], shape, file, offset, nbytes)

    def __iter__(self) -> Iterator[str]:
        return self.names(0)

    def __len__(self) -> int:
        return len(self.native)

    def names(self, first: int) -> Iterator[str]:
        """Yield the names from position `first` on."""
        for start in range(first, len(self), CHUNK):
            yield from self.native.names(start, start + CHUNK)


class Metadata(Mapping[str, str]):
    """The `__metadata__` of a header."""

    __slots__ = ("_native",)

    def __init__(self, native: _native.StringTable) -> None:
        self._native = native

    def __getitem__(self, name: str) -> str:
        found = self._native.find(name) if isinstance(name, str) else None
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.pairs())

    def __len__(self) -> int:
        return len(self._native)

    def __repr__(self) -> str:
        return f"Metadata({dict(self)!r})"

    def pairs(self) -> Iterator[tuple[str, str]]:
        for start in range(0, len(self), CHUNK):
            yield from self._native.items(start, start + CHUNK)


class DuplicateTensor(ValueError):
    """A tensor of this file is also in file number `file`."""

    def __init__(self, message: str, file: int) -> None:
        super().__init__(message)
        self.file = file


def read_header(file: io.BufferedReader, size: int, tensors: _native.TensorTable) -> Metadata:
    """Add the tensors of a file of `size` bytes to those of the files before it.

    Raises ValueError if anything in the header is inconsistent; the table is then unusable.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > LIMIT:
        raise ValueError(f"a header of {length} bytes is over the limit of {LIMIT}")
    if length > size - 8:
        raise ValueError(f"truncated: a header of {length} bytes in a file of {size}")
    added = tensors.add(file.read(length), 8 + length, size)
    if added[0] is None:
        raise DuplicateTensor(*added[1])
    return Metadata(added[0])


def parse_object(raw: bytes) -> dict[str, object]:
    """Check that an index is a JSON object, and return its "weight_map" if that has only strings.

    Other members are checked and omitted. Raises ValueError if the index is invalid.
    """
    if len(raw) > LIMIT:
        raise ValueError(f"an index of more than {LIMIT} bytes is over the limit")
    found = _native.strings_of(raw, "weight_map", MOST_NAMES)
    return {} if found is None else {"weight_map": dict(Metadata(found).pairs())}


def strings(what: str, value: object) -> dict[str, str]:
    """Return `value` if it is an object of strings; else raise ValueError, which names `what`."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{what} is not an object of strings")
    return value
