"""Measure how much of an arena checkpoints need, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from . import open_checkpoint
from .dtypes import planned_casts
from .layout import Layout, build_layout


@dataclass(frozen=True)
class Sizes:
    """One checkpoint: its files with their bytes, its layout, and the granules of each layer."""

    path: str
    files: tuple[tuple[str, int], ...]
    layout: Layout
    granules: tuple[int, ...]

    @property
    def total(self) -> int:
        """Granules of all layers together."""
        return sum(self.granules)


def measure(
    path: Path, granule: int, dtype: str | None = None, *, max_padding: float = 1.0
) -> Sizes:
    """Read a checkpoint's headers and return its sizes.

    Every layer takes whole granules of `granule` bytes. Layers are merged as `build_layout` says.
    Raises as `open_checkpoint`, `planned_casts` and `build_layout`.
    """
    with closing(open_checkpoint(path, allow_symlinks=True)) as opened:
        casts = {} if dtype is None else planned_casts(opened.tensors, dtype)
        layout = build_layout(opened, None, casts, granule=granule, max_padding=max_padding)
        files = tuple((str(file.path), file.identity.size) for file in opened.files)
    counts = tuple(-(-layer.nbytes // granule) for layer in layout.layers)
    return Sizes(str(path), files, layout, counts)


def dtypes_of(sizes: Sizes, layer: int) -> Sequence[str]:
    """Return the dtypes of a layer's tensors in the arena, each once, in file order."""
    names = (tensor.dtype.name for tensor in sizes.layout.layers[layer].tensors)
    return list(dict.fromkeys(names))
