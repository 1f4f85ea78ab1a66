"""Read requests from a file, and refuse an invalid file with file, line, column and value."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("t_s", "model", "input_tokens", "output_tokens")
_LARGEST = 2**31 - 1

Columns = tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


class TraceError(ValueError):
    """Raised for an invalid trace file. The message names file, line, column and value."""


def read_columns(path: str | Path, names: Sequence[str]) -> Columns:
    """Return the times, models, prompts and outputs of a CSV file.

    The file must have the columns of COLUMNS, in any order; other columns are ignored. Times are
    seconds that never fall, and a model is given by its name or by its index in ``names``. Tokens
    are whole numbers, and each request has at least one token of output.

    Parameters
    ----------
    path
        The file; gzipped if its name ends in .gz.
    names
        The names of the models.

    Raises
    ------
    TraceError
        If the file is invalid.
    OSError
        If the file cannot be read.
    """
    rows = _rows(Path(path))
    if not rows:
        raise TraceError(f"{path}: empty: a trace must start with the header {','.join(COLUMNS)}")
    header, body = [name.strip() for name in rows[0]], rows[1:]
    for name in COLUMNS:
        if name not in header:
            raise TraceError(f"{path}:1: the header must have a column {name}")
    if not body:
        raise TraceError(f"{path}: no requests after the header")
    for line, row in enumerate(body, 2):
        if len(row) != len(header):
            raise TraceError(f"{path}:{line}: {len(row)} fields, but the header has {len(header)}")
    models = {str(index): index for index in range(len(names))}
    models |= {name: index for index, name in enumerate(names)}

    def model(text: str) -> int:
        index = models.get(text)
        if index is None:
            raise ValueError(f"is no model: choose one of {', '.join(names)}")
        return index

    def column(name: str, convert: Callable[[str], float]) -> list[float]:
        place = header.index(name)
        values: list[float] = []
        try:
            for row in body:
                values.append(convert(row[place]))  # their number tells the line of an error
        except ValueError as error:
            line, text = len(values) + 2, body[len(values)][place]
            raise TraceError(f"{path}:{line}: column {name}: {text!r} {error}") from None
        return values

    time = np.array(column("t_s", _seconds))
    falls = np.diff(time) < 0
    if falls.any():
        late = int(falls.argmax()) + 1
        text = body[late][header.index("t_s")]
        raise TraceError(f"{path}:{late + 2}: column t_s: {text!r} is before the line above")
    return (
        time,
        np.array(column("model", model), np.int32),
        np.array(column("input_tokens", _prompt), np.int32),
        np.array(column("output_tokens", _output), np.int32),
    )


def _rows(path: Path) -> list[list[str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: {error}") from None
    while rows and not rows[-1]:
        rows.pop()
    return rows


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is not a number") from None
    if 0 <= value < math.inf:
        return value
    raise ValueError("is negative" if -math.inf < value < 0 else "is not finite")


def _prompt(text: str) -> int:
    return _tokens(text, 0)


def _output(text: str) -> int:
    return _tokens(text, 1)


def _tokens(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError("is not a whole number") from None
    if not least <= value <= _LARGEST:
        if value < 0:
            raise ValueError("is negative")
        raise ValueError(f"is not between {least} and {_LARGEST}")
    return value
