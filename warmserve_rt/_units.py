"""Parse and format sizes in bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import SupportsFloat, SupportsIndex, TypeAlias

from ._arguments import integer, number, shown

Size: TypeAlias = str | SupportsIndex | SupportsFloat
"""Bytes, or a string such as ``"2GiB"``, ``"2GB"`` or ``"512"``."""

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d{1,30})(?:\.(\d{1,30}))?\s*(?:b|([kmgt])(i?)(b?)|(%))?", re.ASCII)
_LIMIT = 1 << 62


def parse_bytes(
    size: Size, name: str = "size", *, of: Callable[[], int] | None = None, whole: str = ""
) -> int:
    """Return the number of bytes of a size.

    Parameters
    ----------
    size : number or str
        A whole number (floats too), or a string in either case: "2GiB" and "2MiB" use units of
        1024, "2GB" and "2MB" units of 1000, "512" and "512 B" are bytes. Fractions of a byte are
        dropped. "50%" is a share of ``of()`` and needs ``of``.
    name : str
        The argument's name, for messages.
    of : callable, optional
        Returns the bytes that percentages refer to; 0 if unknown.
    whole : str
        Words for these bytes in messages, such as "the device's memory".

    Raises
    ------
    ValueError, TypeError
        In one sentence that begins with ``name``.
    """
    if isinstance(size, str):
        found = _of_string(size, name, of, whole)
    elif isinstance(size, SupportsIndex) and not isinstance(size, bool):
        found = integer(name, size)
    elif hasattr(size, "is_integer") and size.is_integer():  # Python's floats and numpy's
        found = int(number(name, size))
    else:
        found = None
    if found is None or found < 0:
        refused = ValueError if isinstance(size, str | float) or found is not None else TypeError
        percent = ", '50%'" if of else ""
        raise refused(
            f"{name} must be a whole number of bytes or a string such as '256MiB', '2GB'{percent}, "
            f"got {shown(size)}"
        )
    if found >= _LIMIT:
        raise ValueError(f"{name} must be less than 4 EiB, got {shown(size)}")
    return found


def _of_string(size: str, name: str, of: Callable[[], int] | None, whole: str) -> int | None:
    """Return the bytes, or None if the string is not a size."""
    match = _SIZE.fullmatch(size.strip().lower())
    if match is None or (match[6] and not of):
        return None
    integral, fractional, prefix, binary, byte, percent = match.groups(default="")
    digits = int(integral + fractional)  # floats would round
    scale: int = 10 ** len(fractional)
    if percent and of:
        return _share(size, name, digits, 100 * scale, of(), whole)
    if prefix and not (binary or byte):
        raise ValueError(
            f"{name} must say whether it counts in 1000s or 1024s, got {shown(size)}: write "
            f"'{size.strip()}B' or '{size.strip()}iB'"
        )
    factor: int = (1024 if binary else 1000) ** _POWERS[prefix]
    return digits * factor // scale


def _share(size: str, name: str, numerator: int, denominator: int, total: int, whole: str) -> int:
    if numerator > denominator:
        raise ValueError(f"{name} must be at most 100% of {whole}, got {shown(size)}")
    if not total:
        raise ValueError(f"{name} must be in bytes, got {shown(size)}: {whole} is unknown")
    return total * numerator // denominator


def format_bytes(nbytes: float) -> str:
    """Return a size such as "512 B", "1.5 MiB" or "530 MiB": at most four digits, units of 1024."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"
