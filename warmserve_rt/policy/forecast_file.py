"""Write the state of a forecaster to a file, and read it."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "warmserve_rt forecaster 1"

# Errors that damaged contents cause when they are read or restored.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, AttributeError,
    OverflowError, NotImplementedError,
)  # fmt: skip


def write_state(
    path: str | os.PathLike[str], header: Mapping[str, Any], state: Mapping[str, NDArray[Any]]
) -> None:
    """Write a state to a file. Atomic: after any failure the old file is unchanged.

    Parameters
    ----------
    path
        The file to write.
    header
        The part of the state that JSON can hold.
    state
        The arrays of the state.
    """
    path = Path(path)
    text = json.dumps({"format": FORMAT, **header})
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            np.savez(file, header=np.array(text), **state)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def saved_state(
    path: str | os.PathLike[str],
) -> Iterator[tuple[dict[str, Any], dict[str, NDArray[Any]]]]:
    """Read the header and the arrays that :func:`write_state` wrote, and restore them in a block.

    Raises
    ------
    ValueError
        If the file is not a saved forecaster, or if the block fails because the contents are
        damaged.
    OSError
        If the file cannot be read.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            state = {name: file[name] for name in file.files}
        header = json.loads(str(state["header"]))
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        yield header, state
    except DAMAGED as error:
        raise ValueError(f"{path} is not a saved forecaster: {error}") from error
