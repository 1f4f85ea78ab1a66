"""The weight kernels on host memory: digests, casts and shards of tensors.

Their bodies are the ones that GPUs run, so results are the same to the bit. Arrays are numpy's,
torch's (on the CPU), or anything else with the buffer protocol or DLPack; they must be contiguous,
and their dtypes do not matter: what is in them is what the function says. The interpreter is free
while they run. Whatever does not fit together is a ValueError, and nothing is written.
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
    """A digest of every ``granule_bytes`` bytes; the last granule may be short.

    Digests of equal bytes are equal wherever they lie. Those of bytes that differ within one 32-bit
    word, or in length alone, always differ; others are alike by chance only. No protection against
    somebody who chooses the bytes. A granule is of at most 16 GiB.
    """
    return _native.digest(_bytes(array), granule_bytes)


def cast(
    kind: str, source: Any, target: Any, scales: Any = None, *, block: tuple[int, int] | None = None
) -> None:
    """Converts all elements of ``source`` into ``target``, which has as many: one of ``CASTS``.

    Rounds to nearest even. A NaN becomes the positive quiet one, but widening to f32 keeps its
    sign and payload; what f16 cannot hold becomes infinite.

    fp8 may have scales, by which it is multiplied in f32 before it is rounded. Then ``source`` is a
    matrix and ``scales`` one of f32 with an element for each ``block``, (rows, columns), of it; the
    blocks at the right and the lower edge may be cut off. For (4096, 8192): one scale for the
    tensor is ``block=(4096, 8192)``, one for each row ``(1, 8192)``, one for each column
    ``(4096, 1)``.
    """
    if scales is None:
        if block is not None:
            raise ValueError("blocks, but no scales")
        return _native.cast(kind, _bytes(source), _bytes(target, writable=True))
    shape = tuple(np.shape(source)) if hasattr(source, "shape") else ()
    if len(shape) != 2:
        raise ValueError(f"scales are for a matrix, and the source has the shape {shape}")
    if block is None:
        raise ValueError("scales, but no blocks")
    if 0 in shape:
        return _native.cast(kind, _bytes(source), _bytes(target, writable=True))
    return _native.cast(
        kind, _bytes(source), _bytes(target, writable=True), _bytes(scales), shape[1], *block
    )


def gather_rows(
    source: Any, target: Any, *, rows: int, row_bytes: int, pitch: int, offset: int = 0
) -> None:
    """Copies part of each row of a row-major matrix: a column-parallel shard of a weight.

    Row r of ``target`` is the ``row_bytes`` bytes at ``offset + r * pitch`` of ``source``; in the
    target the rows lie one after the other. ``pitch`` is the bytes of one of the source's rows.
    """
    view = _bytes(source)
    if not 0 <= offset <= len(view):
        raise ValueError(f"an offset of {offset} in {len(view)} bytes")
    _native.gather_rows(view[offset:], _bytes(target, writable=True), rows, row_bytes, pitch)


def fatbin_path() -> Path | None:
    """The kernels as compiled for GPUs, if this installation has them."""
    path = Path(__file__).with_name("weight_kernels.fatbin")
    return path if path.exists() else None


def _bytes(array: Any, *, writable: bool = False) -> npt.NDArray[np.uint8]:
    """The array's own memory as bytes."""
    if hasattr(array, "is_contiguous"):  # torch, some of whose dtypes numpy lacks
        if not array.is_contiguous():
            raise ValueError("a tensor that is not contiguous")
        import torch

        array = np.from_dlpack(array.detach().reshape(-1).view(torch.uint8))
    elif not isinstance(array, np.ndarray):
        try:
            array = np.frombuffer(array, np.uint8)
        except TypeError:
            array = np.from_dlpack(array)
    if not array.flags.c_contiguous:
        raise ValueError("an array that is not contiguous")
    if writable and not array.flags.writeable:
        raise ValueError("an array that cannot be written")
    flat: npt.NDArray[np.uint8] = array.reshape(-1).view(np.uint8)
    return flat
