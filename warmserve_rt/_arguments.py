"""Check the arguments of public calls.

Each function returns the argument in the type that the rest of the library uses. It raises
TypeError for a value of the wrong type and ValueError for a value out of range, in one sentence:
"loaders must be an integer from 1 to 1024, got 0". `name` is the argument's name.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Iterable
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
Integer: TypeAlias = SupportsIndex
"""An int or another integer, such as numpy's."""
Number: TypeAlias = SupportsFloat
"""An int or a float, or a number of numpy."""

_LONGEST = 80  # characters of a value that a message shows


def shown(value: object) -> str:
    """Return the value for a message: its repr, shortened if it is long."""
    try:
        text = repr(value)
    except Exception:  # a message must not fail because repr() does
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def integer(
    name: str, value: SupportsIndex, low: int | None = None, high: int | None = None
) -> int:
    """Return an integer in [low, high]. Accepts numpy's integers; refuses bool and float."""
    wanted = _range("an integer", low, high)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    try:
        number = operator.index(value)
    except TypeError:  # arrays have __index__ and raise
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def number(name: str, value: SupportsFloat, *, finite: bool = True) -> float:
    """Return a float. Accepts integers and numpy's scalars; refuses bool, str and NaN, and
    infinities if `finite`."""
    wanted = "a finite number" if finite else "a number"
    found = _float(name, value, wanted)
    if math.isnan(found) or (finite and math.isinf(found)):
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    return found


def fraction(name: str, value: SupportsFloat) -> float:
    """Return a float in [0, 1]."""
    found = _float(name, value, "in [0, 1]")
    if not 0 <= found <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {shown(value)}")
    return found


def seconds(name: str, value: SupportsFloat) -> float:
    """Return a duration of zero or more seconds; infinity is accepted."""
    found = _float(name, value, "a number of seconds")
    if not found >= 0:
        raise ValueError(f"{name} must be zero or more seconds, got {shown(value)}")
    return found


def timeout(value: SupportsFloat | None, name: str = "timeout") -> float | None:
    """Return seconds to wait, or None; None and infinity mean no limit."""
    return None if value is None else seconds(name, value)


def flag(name: str, value: object) -> bool:
    """Return a bool. Accepts numpy's bools and refuses other values, such as 1."""
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool", "bool_") and type(value).__module__ == "numpy":
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {shown(value)}")


def text(name: str, value: object) -> str:
    """Return a string that is not empty and can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} must be valid Unicode, got {shown(value)}") from None
    return str(value)  # not a subclass, such as numpy's


def path(name: str, value: object) -> str:
    """Return a path as a string; bytes are decoded with the file system's encoding."""
    if not isinstance(value, str | bytes | os.PathLike):
        raise TypeError(f"{name} must be a path (str, bytes or os.PathLike), got {shown(value)}")
    found = os.fsdecode(value)
    if not found:
        raise ValueError(f"{name} must not be an empty path")
    if "\0" in found:
        raise ValueError(f"{name} must not contain a NUL character, got {shown(found)}")
    return found


def paths(name: str, value: object) -> str | list[str]:
    """Return a path, or an iterable of paths as a list."""
    if isinstance(value, str | bytes | os.PathLike):
        return path(name, value)
    items = sequence(name, value, "paths", or_one="a path (str, bytes or os.PathLike) or ")
    return [path(f"{name}[{index}]", each) for index, each in enumerate(items)]


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """Return a value that is one of `choices`; the error message suggests the nearest choice."""
    if isinstance(value, str) and value in choices:
        return str(value)
    error = ValueError if isinstance(value, str) else TypeError
    raise error(
        f"{name} must be {either(choices)}, got {shown(value)}{did_you_mean(value, choices)}"
    )


def either(choices: Collection[str]) -> str:
    """Return the choices for a message: "'a', 'b' or 'c'"."""
    quoted = [repr(each) for each in choices]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def did_you_mean(value: object, choices: Collection[str]) -> str:
    """Return the end of a message, "; did you mean 'streams'?", or "" if no choice is near."""
    if not isinstance(value, str):
        return ""
    import difflib  # only messages need it

    by_lower = {each.lower(): each for each in choices}
    near = difflib.get_close_matches(value.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def sequence(name: str, value: object, of: str, or_one: str = "") -> list[Any]:
    """Return an iterable, but not a string, as a list; `of` names its items in messages."""
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be {or_one}a sequence of {of}, got {shown(value)}")
    return list(value)


def _range(what: str, low: int | None, high: int | None) -> str:
    if low is not None and high is not None:
        return f"{what} from {low} to {high}"
    if low is not None:
        return f"{what} of {low} or more"
    return what if high is None else f"{what} of {high} or less"


def _float(name: str, value: SupportsFloat, wanted: str) -> float:
    if isinstance(value, float):
        return float(value)
    # Strings have no __float__. Arrays and tensors have it, but only scalars are accepted.
    if (
        isinstance(value, bool)
        or not (hasattr(value, "__float__") or hasattr(value, "__index__"))
        or getattr(value, "shape", ()) != ()
    ):
        raise TypeError(f"{name} must be {_a_number(wanted)}, got {shown(value)}")
    try:
        return float(value)
    except (TypeError, OverflowError):
        raise ValueError(f"{name} must be {_a_number(wanted)}, got {shown(value)}") from None


def _a_number(wanted: str) -> str:
    return wanted if "number" in wanted else f"a number {wanted}"
