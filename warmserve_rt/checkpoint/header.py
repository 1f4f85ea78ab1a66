"""The header of a safetensors file: parsed, and refused when anything in it is inconsistent."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

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
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes from byte `offset` of file number `file`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


def read_header(file: io.BufferedReader, size: int) -> tuple[dict[str, object], int]:
    """The header of a file of `size` bytes, and the offset where the tensors' bytes start."""
    length = int.from_bytes(file.read(8), "little")
    if length > LIMIT:
        raise ValueError(f"a header of {length} bytes is over the limit of {LIMIT}")
    if length > size - 8:
        raise ValueError(f"truncated: a header of {length} bytes in a file of {size}")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise ValueError("the header is not a JSON object: it does not begin with '{'")
    return parse_object(raw), 8 + length


def parse_object(raw: bytes) -> dict[str, object]:
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


def entry_of(name: str, item: object, file: int, start: int) -> TensorEntry:
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


def strings(what: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{what} is not an object of strings")
    return value
