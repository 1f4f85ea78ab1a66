"""The source of a registered model, opened at registration and again when it is reloaded."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from warmserve_rt import _native
from warmserve_rt.checkpoint import Checkpoint, Source, open_checkpoint, shown
from warmserve_rt.checkpoint.dtypes import DTypeLike, planned_casts
from warmserve_rt.checkpoint.layout import Grouping, Layout, build_layout

Verify: TypeAlias = Literal["sampled", "full"]
# For each layer's name, the digests of its granules as Runtime.digest returns them.
Digests: TypeAlias = Mapping[str, Sequence[int] | npt.NDArray[np.uint64]]

_ONE_IN = 16  # "sampled" checks one granule in 16, and the first and the last of a layer


def anchored(source: Source) -> Source:
    """Return a source whose paths mean the same in any working directory; an id stays an id."""
    if not isinstance(source, str | bytes | os.PathLike):
        return [path if not os.path.exists(path) else os.path.abspath(path) for path in source]
    return os.path.abspath(source) if os.path.exists(source) else source


class FileIdentity(NamedTuple):
    """The facts by which a changed file is noticed when it is read. The times are modulo 2**64."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class SourceFile(NamedTuple):
    """One file of a checkpoint, as the native runtime accepts it."""

    descriptor: int
    path: str  # for messages
    identity: FileIdentity


@dataclass(frozen=True, slots=True)
class Opened:
    """An open checkpoint in the form that the native runtime accepts."""

    checkpoint: Checkpoint
    layout: Layout
    checks: _native.Checks

    def files(self) -> Iterator[SourceFile]:
        """Yield the files and close each one when the next is requested.

        The native runtime duplicates the descriptors, and a process has few.
        """
        for file in self.checkpoint.files:
            i = file.identity
            times = (i.mtime_ns % 2**64, i.ctime_ns % 2**64)
            identity = FileIdentity(i.device, i.inode, i.size, *times)
            yield SourceFile(file.fd, shown(file.path), identity)
            file.close()


@dataclass(frozen=True, slots=True)
class Origin:
    """The arguments of a registration that determine a model's bytes."""

    source: Source
    dtype: DTypeLike | Mapping[str, DTypeLike] | None = None
    grouping: Grouping | None = None
    allow_symlinks: bool = False
    variant: str | None = None
    revision: str | None = None
    verify: Verify | None = None
    max_padding: float = 1.0

    @contextmanager
    def opened(self, granule_bytes: int, digests: Digests | None) -> Iterator[Opened]:
        """Open the checkpoint and close it at the end of the block. Raises as
        :meth:`Runtime.register`."""
        if self.verify not in (None, "sampled", "full"):
            raise ValueError(f'verify must be None, "sampled" or "full", got {self.verify!r}')
        with closing(
            open_checkpoint(
                self.source,
                allow_symlinks=self.allow_symlinks,
                variant=self.variant,
                revision=self.revision,
            )
        ) as checkpoint:
            casts = {} if self.dtype is None else planned_casts(checkpoint.tensors, self.dtype)
            layout = build_layout(
                checkpoint,
                self.grouping,
                casts,
                granule=granule_bytes,
                max_padding=self.max_padding,
            )
            yield Opened(checkpoint, layout, _checks(layout, granule_bytes, self.verify, digests))


def _checks(
    layout: Layout, granule_bytes: int, verify: Verify | None, digests: Digests | None
) -> list[list[tuple[int, int | None]]]:
    """Return for each layer (granule, digest) pairs to check; None: compute it from the files."""
    if verify is None and digests is None:
        return []
    for name in digests or ():
        if name not in layout.index_of:
            raise ValueError(f"digests must name layers of the model, got {name!r}")
    chosen: list[list[tuple[int, int | None]]] = []
    for layer in layout.layers:
        count = -(-layer.nbytes // granule_bytes)
        known: list[int] | list[None] = [None] * count
        if digests is not None:
            if layer.name not in digests:
                raise ValueError(f"digests must have every layer, and {layer.name!r} is missing")
            known = [int(digest) for digest in digests[layer.name]]
            if len(known) != count or not all(0 <= digest < 2**64 for digest in known):
                raise ValueError(
                    f"digests of {layer.name!r} must be {count} integers of 64 bits, one for each "
                    f"granule of {granule_bytes} bytes, got {len(known)}"
                )
        granules = _sample(count) if verify == "sampled" else range(count)
        chosen.append([(granule, known[granule]) for granule in granules])
    return chosen


def _sample(count: int) -> list[int]:
    """Choose some numbers below `count`, unpredictably."""
    some = random.SystemRandom().sample(range(count), -(-count // _ONE_IN))
    return sorted({0, count - 1, *some}) if count else []
