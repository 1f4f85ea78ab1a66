"""Headers of many kinds, of the maximum length, that are expensive to read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

E_ACUTE, ESCAPED_A = "\u00e9", "\\u0061"
ENTRY = '"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def _filled(size: int, member: Callable[[int], str], before: str = "{", after: str = "}") -> str:
    """Return a JSON object with as many members as fit into `size` bytes."""
    parts, length, number = [before], len(before) + len(after), 0
    while True:
        part = member(number)
        length += len(part.encode()) + 1
        if length > size:
            return "".join([parts[0], ",".join(parts[1:]), after])
        parts.append(part)
        number += 1


def _values(size: int, value: str) -> str:
    """Return one tensor with an unknown field."""
    return ENTRY[:-1].replace("%s", "t") + ',"x":' + value.ljust(size - 70) + "}"


KINDS: dict[str, Callable[[int], str]] = {
    "many_tensors": lambda n: _filled(n, lambda i: ENTRY % format(i, "x")),
    "many_blocks": lambda n: _filled(n, lambda i: ENTRY % f"h.{i}.w"),
    "many_stacks": lambda n: _filled(n, lambda i: ENTRY % f"s{i:x}{'.0' if i % 2 else ''}"),
    "many_experts": lambda n: _filled(n, lambda i: ENTRY % f"h.0.experts.{i}.w"),
    "long_names": lambda n: _filled(n, lambda i: ENTRY % f"{i}{'n' * (1 << 20)}"),
    "longest_name": lambda n: "{" + ENTRY % ("n" * (n - 60)) + "}",
    "long_names_not_ascii": lambda n: _filled(n, lambda i: ENTRY % f"{i}{E_ACUTE * 500_000}"),
    "many_dots": lambda n: _filled(n, lambda i: ENTRY % f"{i}{'a.' * (1 << 20)}"),
    "dots_before_a_block": lambda n: _filled(n, lambda i: ENTRY % f"{'a.' * (1 << 19)}{i}.w"),
    "many_numbers": lambda n: _filled(n, lambda i: ENTRY % f"{i}{'.1' * 100}"),
    "projectors": lambda n: _filled(n, lambda i: ENTRY % f"{i}{'projector' * 100_000}s"),
    "embeddings": lambda n: _filled(n, lambda i: ENTRY % f"{i}{'embed_out' * 100_000}"),
    "many_axes": lambda n: _filled(
        n, lambda i: f'"{i:x}":{{"dtype":"U8","shape":[{"0," * 63}0],"data_offsets":[0,0]}}'
    ),
    "long_shape": lambda n: '{"t":{"dtype":"U8","shape":[' + "0," * (n // 2 - 50) + "0]}}",
    "metadata_keys": lambda n: _filled(n, lambda i: f'"{i:x}":""', '{"__metadata__":{', "}}"),
    "metadata_value": lambda n: '{"__metadata__":{"k":"' + "v" * (n - 30) + '"}}',
    "metadata_not_ascii": lambda n: '{"__metadata__":{"k":"' + E_ACUTE * (n // 2 - 20) + '"}}',
    "nesting": lambda n: "{" + _values(n, "[" * (n - 70)) + "}",
    "nesting_allowed": lambda n: (
        "{" + _values(n, f"[{('[' * 60 + ']' * 60 + ',') * (n // 121 - 2)}0]")
    ),
    "many_values": lambda n: "{" + _values(n, "[" + "0," * (n // 2 - 50) + "0]") + "}",
    "many_objects": lambda n: "{" + _values(n, "[" + "{}," * (n // 3 - 50) + "0]") + "}",
    "many_fields": lambda n: "{" + _values(n, _filled(n - 80, lambda i: f'"{i:x}":0')) + "}",
    "digits": lambda n: "{" + _values(n, "9" * (n - 70)) + "}",
    "digits_of_an_offset": lambda n: '{"t":{"dtype":"U8","shape":[' + "9" * (n - 50) + "]}}",
    "numbers": lambda n: (
        "{" + _values(n, "[" + ("1" * 4000 + ".5,") * (n // 4003 - 1) + "0]") + "}"
    ),
    "exponents": lambda n: "{" + _values(n, "[" + "1e-999," * (n // 7 - 50) + "0]") + "}",
    "escapes": lambda n: _filled(n, lambda i: ENTRY % f"{i}{ESCAPED_A * 100_000}"),
    "escaped_pairs": lambda n: '{"__metadata__":{"k":"' + "\\ud83d\\ude00" * (n // 12 - 9) + '"}}',
    "duplicates": lambda n: _filled(n, lambda i: ENTRY % "t"),
    "last_is_a_duplicate": lambda n: (
        _filled(n - 100, lambda i: ENTRY % format(i, "x"))[:-1] + "," + ENTRY % "0" + "}"
    ),
    "last_is_cut": lambda n: _filled(n, lambda i: ENTRY % format(i, "x"))[:-1],
    "spaces": lambda n: "{" + ENTRY % "t" + " " * (n - 60) + "}",
}


def write_header(path: Path, kind: str, size: int) -> None:
    """Write a file with a header of this kind, about ``size`` bytes of UTF-8 long."""
    raw = KINDS[kind](size).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)


def write_blocks(path: Path, tensors: int, for_each_block: int) -> None:
    """Write a file of small tensors in the blocks of one stack, `for_each_block` per block."""
    header = {
        f"model.layers.{i // for_each_block}.part{i % for_each_block}.weight": {
            "dtype": "F32",
            "shape": [4, 4],
            "data_offsets": [64 * i, 64 * i + 64],
        }
        for i in range(tensors)
    }
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(64 * tensors))
