"""A part of bench/gpu.py: its settings, checkpoints and results."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lib.cuda import LIBRARY, NotRun
from lib.harness import MIB, Llama
from warmserve_rt import Model, Runtime, _native

T = TypeVar("T")

__all__ = ["NotRun", "Part", "arena_for", "layer_address", "layer_bytes"]

GRANULE = 2 * MIB
# The models' layers differ in size, so that a swap cannot reuse granules one to one.
SMALL = {"small_a": Llama(512, 1408, 128, 8000, 6), "small_b": Llama(384, 1024, 96, 12000, 10)}
MEDIUM = {"a": Llama(2048, 5632, 256, 32000, 9), "b": Llama(1536, 4096, 256, 49152, 15)}  # 1 GiB
LARGE = {"large": Llama(2048, 5632, 256, 32000, 22)}  # 2 GiB


def checkpoints(simulated: bool, quick: bool) -> Mapping[str, Llama]:
    """Return the checkpoints by file name; the simulated device copies slowly, so all are small."""
    small_a, small_b = SMALL.values()
    if quick:
        return {**SMALL, "a": small_a, "b": small_b, "large": small_a}
    if not simulated:
        return {**SMALL, **MEDIUM, **LARGE}
    return {**SMALL, "a": small_a, "b": small_b, "large": Llama(1024, 2816, 256, 32000, 3)}


@dataclass
class Part:
    """The settings and results of a part."""

    args: argparse.Namespace  # device, leases, quick, json
    folder: Path  # has the checkpoints
    simulated: bool
    prefix: str = ""  # of the names of rows
    rows: list[tuple[str, float, str]] = field(default_factory=list)
    targets: list[tuple[str, float, str, str, float]] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)

    def save(self, outcome: str = "") -> None:
        """Write the results so far; without an outcome the part has not ended."""
        found = {
            "outcome": outcome,
            "rows": self.rows,
            "targets": self.targets,
            "decides": self.decisions,
        }
        partial = self.args.json.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(self.args.json)

    def row(self, name: str, value: float, unit: str) -> None:
        self.rows.append((self.prefix + name, value, unit))
        self.save()

    def target(self, name: str, value: float, unit: str, op: str, bound: float) -> None:
        self.targets.append((name, value, unit, op, bound))
        self.save()

    def decide(self, sentence: str) -> None:
        """Record a sentence that follows from the results."""
        self.decisions.append(sentence)
        self.save()

    @contextmanager
    def question(self, about: str) -> Iterator[None]:
        """Enclose the answer to one of several questions; the others survive its failure."""
        try:
            yield
        except NotRun as error:
            self.decide(f"NOT RUN, {about}: {error}")
        except Exception as error:
            traceback.print_exc()
            self.decide(f"FAILED, {about}: {type(error).__name__}: {error}")

    def size(self, whole: T, quick: T) -> T:
        return quick if self.args.quick else whole

    def scale(self, whole: T, small: T) -> T:
        """Return the size of something on a GPU, or its small size with --quick or simulated."""
        return small if self.args.quick or self.simulated else whole

    def yes(self, name: str, value: bool) -> None:
        """Record a condition with the target that it holds."""
        self.target(name, int(value), "", "=", 1)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def runtime(self, **options: Any) -> Runtime:
        options.setdefault("tensors", "dlpack")
        options.setdefault("granule", GRANULE)
        options.setdefault("max_padding", 1)  # so that rows by granule compare the same layers
        if self.simulated:  # the simulated device has kernels, but no kernel file
            driver = _native.cuda_driver(library=LIBRARY, kernels=b"simulated")
            return Runtime(driver=driver, **options)
        return Runtime(self.args.device, **options)

    def register(self, runtime: Runtime, *names: str) -> list[Model]:
        return [runtime.register(name, self.path(name)) for name in names]


def arena_for(part: Part, *names: str, granule: int = GRANULE) -> int:
    """Return the bytes of an arena for the largest of these models plus half a layer."""
    from contextlib import closing

    from warmserve_rt.checkpoint import open_checkpoint
    from warmserve_rt.checkpoint.layout import build_layout

    needs = [0]
    for name in names:
        with closing(open_checkpoint(part.path(name))) as opened:
            layers = build_layout(opened).layers
        granules = [-(-layer.nbytes // granule) for layer in layers]
        needs.append(sum(granules) + max(granules) // 2)
    return max(needs) * granule


def layer_bytes(model: Model, path: Path, layer: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of a layer as the file has them."""
    spec = model.layers[layer]
    wanted = np.zeros(spec.nbytes, np.uint8)
    with path.open("rb") as file:
        for segment in spec.segments:
            file.seek(segment.file_offset)
            piece = wanted[segment.layer_offset : segment.layer_offset + segment.nbytes]
            file.readinto(piece.data)
    return wanted


def layer_address(model: Model, layer: int) -> int:
    return model.layer_bytes(layer).address
