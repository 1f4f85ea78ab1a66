"""Sizes as people write them."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B|)\s*")


def parse_bytes(size: int | str) -> int:
    """Bytes of ``"256MiB"``, ``"1.5 GiB"`` or a plain number; ValueError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ValueError(f"a size of {size} bytes")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ValueError(f"{size!r} is no size: write a number of bytes, or one such as '256MiB'")
    return int(float(match[1]) * _FACTORS[match[2]])
