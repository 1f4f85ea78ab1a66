"""What the tenants' files hold: how much of it is unique, and whether a lease shows just that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from warmserve_rt.checkpoint import open_checkpoint
from warmserve_rt.checkpoint.layout import build_layout

STEP = 1 << 20  # bytes compared at a time, to stay in the processor's cache


class Content:
    """A checkpoint's bytes, read from its file and hashed as the granules they will lie in."""

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
        self.granules: list[list[bytes]] = []  # of each layer, a digest of each granule
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
        """Whether a tensor in memory has exactly the bytes that the file has for it."""
        wanted = self._tensors[name]
        got: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
        return got.shape == wanted.shape and all(
            np.array_equal(got[start : start + STEP], wanted[start : start + STEP])
            for start in range(0, len(wanted), STEP)
        )


def differing(
    ours: Sequence[Sequence[object]], theirs: Sequence[Sequence[object]]
) -> list[tuple[int, int]]:
    """Layer and granule of each place where digests, by layer, of two models differ."""
    return [
        (layer, granule)
        for layer, pair in enumerate(zip(ours, theirs, strict=True))
        for granule, (one, other) in enumerate(zip(*pair, strict=True))
        if one != other
    ]


def unique_granules(contents: Iterable[Content]) -> int:
    """How many granules would hold all the models, were equal ones kept once."""
    return len({d for each in contents for layer in each.granules for d in layer})


def _hash(*parts: bytes | npt.NDArray[np.uint8]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data if isinstance(part, np.ndarray) else part)
    return digest.digest()
