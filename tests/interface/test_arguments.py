"""Risk: an ordinary argument fails deep inside, or means something else than its caller thought."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warmserve_rt import _arguments as check
from warmserve_rt._units import parse_bytes

SIZES: list[tuple[Any, int]] = [
    (0, 0),
    (5, 5),
    (np.int64(5), 5),
    (np.uint8(5), 5),
    (2e9, 2_000_000_000),
    (np.float32(16), 16),
    ("512", 512),
    ("512 B", 512),
    (" 256MiB ", 256 << 20),
    ("1.5 GiB", 3 << 29),
    ("2gib", 2 << 30),
    ("2Gi", 2 << 30),
    ("2GB", 2_000_000_000),
    ("2.5kb", 2500),
    ("0.1 TB", 100_000_000_000),
    (np.str_("1KiB"), 1024),
    ("50%", 500),
    ("12.5%", 125),
    ("100%", 1000),
]


@pytest.mark.parametrize(("size", "nbytes"), SIZES)
def test_sizes_give_the_expected_bytes(size: Any, nbytes: int) -> None:
    found = parse_bytes(size, "arena", of=lambda: 1000, whole="the device's memory")
    assert (found, type(found)) == (nbytes, int)


@pytest.mark.parametrize(
    ("size", "error", "said"),
    [
        (-1, ValueError, "arena must be a whole number of bytes or a string such as"),
        ("-1", ValueError, "arena must be a whole number of bytes"),
        (2.5, ValueError, "arena must be a whole number of bytes"),
        (math.nan, ValueError, "arena must be a whole number of bytes"),
        (math.inf, ValueError, "arena must be a whole number of bytes"),
        ("2 parsecs", ValueError, "got '2 parsecs'"),
        ("", ValueError, "got ''"),
        ("2G", ValueError, "1000s or 1024s, got '2G': write '2GB' or '2GiB'"),
        ("2iB", ValueError, "arena must be a whole number of bytes"),
        ("\u0662GB", ValueError, "arena must be a whole number of bytes"),
        ("50%", ValueError, r"such as '256MiB', '2GB', got '50%'"),
        (2**70, ValueError, "arena must be less than 4 EiB"),
        ("9" * 5000, ValueError, r"got '9+\.\.\.$"),
        (True, TypeError, "arena must be a whole number of bytes"),
        (None, TypeError, "arena must be a whole number of bytes"),
        (b"2GiB", TypeError, "arena must be a whole number of bytes"),
        ([1], TypeError, "arena must be a whole number of bytes"),
        (np.array([1, 2]), TypeError, "arena must be an integer"),
    ],
)
def test_other_sizes_are_refused(size: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        parse_bytes(size, "arena")


def test_a_share_of_an_unknown_or_larger_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 100% of the device's memory, got '101%'"):
        parse_bytes("101%", "arena", of=lambda: 1000, whole="the device's memory")
    with pytest.raises(ValueError, match="in bytes, got '50%': the device's memory is unknown"):
        parse_bytes("50%", "arena", of=lambda: 0, whole="the device's memory")


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


GOOD: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
    (check.integer, (np.int64(3),), 3),
    (check.integer, (3, 3, 3), 3),
    (check.number, (np.float64(0.5),), 0.5),
    (check.number, (np.int8(3),), 3.0),
    (check.fraction, (0,), 0.0),
    (check.fraction, (np.float32(1),), 1.0),
    (check.seconds, (math.inf,), math.inf),
    (check.seconds, (np.float64(0.5),), 0.5),
    (check.flag, (np.bool_(True),), True),
    (check.flag, (False,), False),
    (check.text, ("caf\u00e9",), "caf\u00e9"),
    (check.path, (b"/a",), "/a"),
    (check.path, (Path("/a"),), "/a"),
    (check.path, (b"/\xff",), os.fsdecode(b"/\xff")),
    (check.choice, ("a", ("a", "b")), "a"),
    (check.sequence, (iter("ab"), "names"), ["a", "b"]),
]


@pytest.mark.parametrize(("function", "arguments", "wanted"), GOOD)
def test_usual_values_are_accepted(
    function: Callable[..., Any], arguments: tuple[Any, ...], wanted: Any
) -> None:
    found = function("x", *arguments)
    assert (found, type(found)) == (wanted, type(wanted))


NO_NUMBERS: list[Any] = ["1", b"1", None, True, [1.0], np.array([1.0, 2.0]), object()]
BAD: list[tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]] = [
    *((check.integer, (value,), TypeError, "x must be an integer, got") for value in NO_NUMBERS),
    (check.integer, (1.0,), TypeError, r"x must be an integer, got 1\.0"),
    (check.integer, (Unprintable(),), TypeError, "got a Unprintable"),
    (check.integer, (0, 1, 8), ValueError, "x must be an integer from 1 to 8, got 0"),
    (check.integer, (9, 1, 8), ValueError, "x must be an integer from 1 to 8, got 9"),
    (check.integer, (-1, 0), ValueError, "x must be an integer of 0 or more, got -1"),
    *((check.number, (value,), TypeError, "x must be a finite number") for value in NO_NUMBERS),
    (check.number, (math.nan,), ValueError, "x must be a finite number, got nan"),
    (check.number, (-math.inf,), ValueError, "x must be a finite number, got -inf"),
    (check.number, (10**400,), ValueError, "x must be a finite number, got 1000"),
    *((check.fraction, (value,), TypeError, r"number in \[0, 1\]") for value in NO_NUMBERS),
    (check.fraction, (1.5,), ValueError, r"x must be in \[0, 1\], got 1\.5"),
    (check.fraction, (math.nan,), ValueError, r"x must be in \[0, 1\], got nan"),
    *((check.seconds, (value,), TypeError, "a number of seconds") for value in NO_NUMBERS),
    (check.seconds, (-1,), ValueError, "x must be zero or more seconds, got -1"),
    (check.seconds, (math.nan,), ValueError, "x must be zero or more seconds, got nan"),
    (check.flag, (1,), TypeError, "x must be True or False, got 1"),
    (check.flag, ("no",), TypeError, "x must be True or False, got 'no'"),
    (check.text, (b"a",), TypeError, "x must be a string, got b'a'"),
    (check.text, (Path("a"),), TypeError, "x must be a string"),
    (check.text, ("",), ValueError, "x must not be empty"),
    (check.text, ("\ud800",), ValueError, "x must be valid Unicode"),
    (check.path, (3,), TypeError, r"x must be a path \(str, bytes or os.PathLike\), got 3"),
    (check.path, ("",), ValueError, "x must not be an empty path"),
    (check.path, ("a\0b",), ValueError, "x must not contain a NUL character"),
    (check.choice, ("lease", ("streams", "leases")), ValueError, "; did you mean 'leases'\\?$"),
    (check.choice, ("LEASES", ("streams", "leases")), ValueError, "; did you mean 'leases'\\?$"),
    (check.choice, ("xyz", ("a", "b", "c")), ValueError, "x must be 'a', 'b' or 'c', got 'xyz'$"),
    (check.choice, (1, ("a",)), TypeError, "x must be 'a', got 1$"),
    (check.sequence, ("ab", "names"), TypeError, "x must be a sequence of names, got 'ab'"),
    (check.sequence, (3, "names"), TypeError, "x must be a sequence of names, got 3"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "said"), BAD)
def test_other_values_are_refused_in_one_sentence(
    function: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as raised:
        function("x", *arguments)
    assert raised.type is error
    assert "\n" not in str(raised.value)
