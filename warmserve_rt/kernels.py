"""The weight kernels on host memory: digests, casts and shards of tensors.

GPUs run the same source, so results agree bit by bit. Arrays are those of numpy or torch (on the
CPU), or any object with the buffer protocol or DLPack. They must be contiguous. Their dtypes are
ignored: each function says how it interprets the bytes. The kernels run without the interpreter's
lock. Arguments that do not fit together raise ValueError before anything is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native

CASTS = (
    "f32_to_bf16",
    "f32_to_f16",
    "f16_to_f32",
    "f16_to_bf16",
    "bf16_to_f32",
    "bf16_to_f16",
    "f8_e4m3_to_bf16",
    "f8_e5m2_to_bf16",
)


def granule_digest(array: Any, granule_bytes: int = 2 << 20) -> npt.NDArray[np.uint64]:
    """Compute a digest of every granule of an array.

    Equal bytes have equal digests at any address. Bytes that differ within one 32-bit word, or only
    in length, always have different digests; other bytes have equal digests only by chance. Digests
    do not protect against an attacker who chooses the bytes.

    Parameters
    ----------
    array : array or buffer
    granule_bytes : int
        Bytes of a granule, at most 16 GiB. The last granule may be shorter.

    Returns
    -------
    array of uint64, shape ``(granules,)``
    """
    return _native.digest(_bytes(array), granule_bytes)


def cast(
    kind: str, source: Any, target: Any, scales: Any = None, *, block: tuple[int, int] | None = None
) -> None:
    """Convert all elements of ``source`` into ``target``, which must have as many elements.

    Rounds to nearest even. A NaN becomes the positive quiet NaN, except that widening to f32 keeps
    its sign and payload. Values too large for f16 become infinite.

    Parameters
    ----------
    kind : one of ``CASTS``
    source, target : array or buffer
        ``target`` must be writable and must not overlap ``source``.
    scales : f32 matrix, optional
        For fp8 only: factors that elements are multiplied by, in f32, before they are rounded.
        ``source`` must then be a matrix, and ``scales`` has one element for each of its blocks.
    block : (rows, columns), optional
        Shape of a block, required with ``scales``. Blocks at the right and lower edges may be cut
        off. For a source of (4096, 8192), ``(4096, 8192)`` is one scale for the tensor, ``(1,
        8192)`` one for each row, and ``(4096, 1)`` one for each column.

    Raises
    ------
    ValueError
        The arguments do not fit together. Nothing is written.
    """
    if scales is None:
        if block is not None:
            raise ValueError("block must be None without scales")
        return _native.cast(kind, _bytes(source), _bytes(target, writable=True))
    shape = tuple(np.shape(source)) if hasattr(source, "shape") else ()
    if len(shape) != 2:
        raise ValueError(f"source must be a matrix if it has scales, got the shape {shape}")
    if block is None:
        raise ValueError("block must be given with scales")
    if 0 in shape:
        return _native.cast(kind, _bytes(source), _bytes(target, writable=True))
    return _native.cast(
        kind, _bytes(source), _bytes(target, writable=True), _bytes(scales), shape[1], *block
    )


def gather_rows(
    source: Any, target: Any, *, rows: int, row_bytes: int, pitch: int, offset: int = 0
) -> None:
    """Copy part of each row of a row-major matrix: a column-parallel shard of a weight.

    Parameters
    ----------
    source, target : array or buffer
        Row r of ``target`` is the ``row_bytes`` bytes at ``offset + r * pitch`` of ``source``. The
        rows of ``target`` are contiguous.
    rows : int
        Rows to copy.
    row_bytes : int
        Bytes of a row of ``target``.
    pitch : int
        Bytes of a row of ``source``.
    offset : int
        Bytes of ``source`` before the first copied byte.

    Raises
    ------
    ValueError
        The arguments do not fit together. Nothing is written.
    """
    view = _bytes(source)
    if not 0 <= offset <= len(view):
        raise ValueError(f"offset must be from 0 to {len(view)}, got {offset}")
    _native.gather_rows(view[offset:], _bytes(target, writable=True), rows, row_bytes, pitch)


def fatbin_path() -> Path | None:
    """Return the path of the kernels compiled for GPUs, None if this installation has none."""
    path = Path(__file__).with_name("weight_kernels.fatbin")
    return path if path.exists() else None


def _bytes(array: Any, *, writable: bool = False) -> npt.NDArray[np.uint8]:
    """Return the array's own memory as bytes."""
    if hasattr(array, "is_contiguous"):  # torch: numpy does not support all of its dtypes
        if not array.is_contiguous():
            raise ValueError("a tensor must be contiguous")
        import torch

        array = np.from_dlpack(array.detach().reshape(-1).view(torch.uint8))
    elif not isinstance(array, np.ndarray):
        try:
            array = np.frombuffer(array, np.uint8)
        except TypeError:
            array = np.from_dlpack(array)
    if not array.flags.c_contiguous:
        raise ValueError("an array must be contiguous")
    if writable and not array.flags.writeable:
        raise ValueError("the target array must be writable")
    flat: npt.NDArray[np.uint8] = array.reshape(-1).view(np.uint8)
    return flat
