"""The bytes of the tenants' files: counts unique granules and compares leased tensors with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from warmserve_rt.checkpoint import open_checkpoint
from warmserve_rt.checkpoint.layout import build_layout

STEP = 1 << 20  # bytes compared at a time, small enough for the processor's cache


class Content:
    """A checkpoint's bytes, read from its files and hashed by granule in a runtime's layout."""

    def __init__(self, path: Path, granule: int) -> None:
        checkpoint = open_checkpoint(path)
        try:
            layout = build_layout(checkpoint)
            files = [np.memmap(file.path, np.uint8, "r") for file in checkpoint.files]
            self._tensors = {
                name: files[entry.file][entry.offset : entry.offset + entry.nbytes]
                for name, entry in checkpoint.tensors.items()
            }
        finally:
            checkpoint.close()
        self.nbytes = layout.nbytes
        self.granules: list[list[bytes]] = []  # for each layer, the digests of its granules
        for layer in layout.layers:
            image = np.zeros(layer.nbytes, np.uint8)
            for part in layer.segments:
                image[part.layer_offset : part.layer_offset + part.nbytes] = files[part.file][
                    part.file_offset : part.file_offset + part.nbytes
                ]
            starts = range(0, layer.nbytes, granule)
            self.granules.append([_hash(image[start : start + granule]) for start in starts])
        self.digest = _hash(*(digest for layer in self.granules for digest in layer)).hex()

    def equals(self, name: str, tensor: torch.Tensor) -> bool:
        """Return whether a tensor in memory has exactly the bytes of the tensor in the file."""
        wanted = self._tensors[name]
        got: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
        return got.shape == wanted.shape and all(
            np.array_equal(got[start : start + STEP], wanted[start : start + STEP])
            for start in range(0, len(wanted), STEP)
        )


def differing(
    ours: Sequence[Sequence[object]], theirs: Sequence[Sequence[object]]
) -> list[tuple[int, int]]:
    """Return (layer, granule) of each difference between the digests of two models."""
    return [
        (layer, granule)
        for layer, pair in enumerate(zip(ours, theirs, strict=True))
        for granule, (one, other) in enumerate(zip(*pair, strict=True))
        if one != other
    ]


def unique_granules(contents: Iterable[Content]) -> int:
    """Return the number of different granules in all models."""
    return len({d for each in contents for layer in each.granules for d in layer})


def _hash(*parts: bytes | npt.NDArray[np.uint8]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data if isinstance(part, np.ndarray) else part)
    return digest.digest()
