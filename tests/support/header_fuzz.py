"""Mutate headers of checkpoints and compare native code with a plain model of the format.

    python tests/support/header_fuzz.py --runs 1000000 --seed 1

No mutation may crash or hang native code. Native code and the model must read a header alike, or
both refuse it with a ValueError. The format's own library must agree on every header that native
code reads.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import time
from typing import Any

import safetensors

from warmserve_rt import _native
from warmserve_rt.checkpoint import DTYPES, TYPES

Answer = dict[str, tuple[str, tuple[int, ...], int, int]]  # by name: dtype, shape, begin, end

_TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"0",
        b"-0",
        b"1.0",
        b"1e2",
        b"1e999",
        b"NaN",
    ),
    *(b"null", b"true", b"\\ud800", b"\\udc00", b"\\u0000", b"\\u0061", b"\xff", b"\xc3\xa9", b" "),
    *(b"\n", b"\0", b"\x0c", b"9223372036854775808", b"18446744073709551616", b"9" * 400, b"-1"),
    *(b'"dtype":"U8",', b'"x":[{}],', b'"shape":[0],', b'"__metadata__":null,', b"[" * 130),
    *(b"\xef\xbb\xbf", b"\xed\xa0\x80", b"01", b"1.", b"+1", b"Infinity", b"'", b"//"),
]


def made(random: random.Random) -> bytes:
    """Make a valid header."""
    header: dict[str, Any] = {}
    if random.random() < 0.4:
        header["__metadata__"] = random.choice([{}, {"format": "pt"}, {"k": "v", "\u00e9": "\n"}])
    at = 0
    for _ in range(random.randrange(4)):
        name = random.choice(["a", "b.0.w", "\u00e9", "", '"', "\U0001f600", "h.1", "x" * 40])
        dtype = random.choice(["U8", "F32", "BF16", "F4", "BOOL", "F8_E4M3"])
        shape = [random.randrange(4) * 2 for _ in range(random.randrange(4))] or [2]
        nbytes = DTYPES[dtype].bits * math.prod(shape) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    return json.dumps(header, ensure_ascii=random.random() < 0.5).encode()


def mutated(raw: bytes, random: random.Random) -> bytes:
    """Change a few bytes."""
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        at = random.randrange(len(raw) + 1)
        to = at + random.choice([0, 0, 1, 1, 4, 20])
        new = random.choice([random.choice(_TOKENS), b"", random.randbytes(1), raw[at : to + 9]])
        raw = raw[:at] + new + raw[to:]
    return raw


class _Refused(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> Any:
    return tuple(pairs)  # a tuple stands for an object, because arrays are lists


def _strict(text: str) -> Any:
    """Parse JSON with objects as tuples of pairs, but more strictly than Python's own reader."""

    def refuse(word: str) -> None:
        raise _Refused(word)

    def fraction(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise _Refused("out of range")
        return value

    def integer(digits: str) -> int | float:
        if digits == "-0":
            return -0.0
        return fraction(digits) if len(digits) > 300 else int(digits)

    value = json.loads(
        text,
        object_pairs_hook=_pairs,
        parse_constant=refuse,
        parse_float=fraction,
        parse_int=integer,
    )
    levels, deep = [value], 0
    while levels:
        deep += any(isinstance(each, list | tuple) for each in levels)
        if deep > 127:
            raise _Refused("too deep")
        for each in levels:
            keys = [key for key, _ in each] if isinstance(each, tuple) else []
            for string in [*keys, each if isinstance(each, str) else ""]:
                string.encode()  # raises UnicodeError for half of a surrogate pair
        levels = [
            inner[1] if isinstance(each, tuple) else inner
            for each in levels
            if isinstance(each, list | tuple)
            for inner in each
        ]
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, tuple) or len({key for key, _ in value}) != len(value):
        raise _Refused("not an object, or a duplicate name")
    return dict(value)


def modelled(raw: bytes, size: int) -> Answer:
    """Read a header as the format says. Raises ValueError."""
    if not raw.startswith(b"{"):
        raise _Refused("not an object")
    header = _object(_strict(raw.decode()))
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not all(isinstance(v, str) for v in _object(metadata).values()):
        raise _Refused("metadata")
    found: Answer = {}
    for name, value in header.items():
        if not isinstance(value, tuple):
            raise _Refused("not an object")
        known = [pair for pair in value if pair[0] in ("dtype", "shape", "data_offsets")]
        entry = _object(tuple(known))
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not lists or not isinstance(dtype, str) or dtype not in DTYPES or len(shape) > 64:
            raise _Refused("fields")
        if not all(type(n) is int and 0 <= n < 2**63 for n in [*shape, *offsets]):
            raise _Refused("numbers")
        bits = DTYPES[dtype].bits
        if bits * math.prod(max(n, 1) for n in shape) >= 2**63:
            raise _Refused("overflow")
        if 8 * (offsets[1] - offsets[0]) != bits * math.prod(shape):
            raise _Refused("span")
        found[name] = (dtype, tuple(shape), offsets[0], offsets[1])
    end = 0
    for _, _, first, last in sorted(found.values(), key=lambda entry: entry[2:]):
        if first != end:
            raise _Refused("hole or overlap")
        end = last
    if end != size:
        raise _Refused("end")
    return found


def read(raw: bytes, size: int) -> Answer:
    """Read a header as native code does. Raises ValueError."""
    table = _native.TensorTable()
    table.add(raw, 0, size)
    found: Answer = {}
    for number in range(len(table)):
        name, dtype, shape, _, offset, nbytes = table.entry(number)
        found[name] = (TYPES[dtype].name, shape, offset, offset + nbytes)
    return found


def check(raw: bytes, size: int) -> bool:
    """Compare native code, the model and the library; return whether the header was read."""
    try:
        expected: Answer | None = modelled(raw, size)
    except (ValueError, RecursionError):
        expected = None
    try:
        found: Answer | None = read(raw, size)
    except ValueError:
        found = None
    assert found == expected, (raw, size, found, expected)
    if found is None:
        return False
    library = safetensors.deserialize(struct.pack("<Q", len(raw)) + raw + bytes(size))
    theirs = {name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in library}
    ours = {name: (dtype, shape, end - begin) for name, (dtype, shape, begin, end) in found.items()}
    assert ours == theirs, (raw, size, ours, theirs)
    return True


def fuzz(runs: int, seed: int) -> int:
    """Check ``runs`` mutated headers and return how many were read."""
    source = random.Random(seed)
    accepted = 0
    for _ in range(runs):
        header = made(source)
        size = max(
            (v["data_offsets"][1] for k, v in json.loads(header).items() if k[:2] != "__"),
            default=0,
        )
        accepted += check(mutated(header, source), size)
    return accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began = time.perf_counter()
    accepted = fuzz(args.runs, args.seed)
    taken = time.perf_counter() - began
    print(f"{args.runs} headers from seed {args.seed}: {accepted} read, {taken:.0f} s")


if __name__ == "__main__":
    main()
