"""Runtimes directly on the simulated CUDA, without checking wrappers, to test the CUDA driver."""

from __future__ import annotations

from pathlib import Path

from checkpoints import GRANULE

from warmserve_rt import Runtime, testing
from warmserve_rt.testing.simcuda import SimulatedCuda

SIZES = [2 * GRANULE, 5]  # bytes per layer of the models "a" and "b" of the fixture `two_files`
WEIGHT = "model.layers.0.weight"


def make(cuda: SimulatedCuda, files: dict[str, Path] | None = None, **options: object) -> Runtime:
    defaults: dict[str, object] = {
        "arena": "8MiB",
        "staging": "4MiB",
        "granule": GRANULE,
        "max_padding": 1,
        "chunk": "2MiB",
    }
    runtime = Runtime(
        driver=testing.cuda_driver(cuda),
        tensors="dlpack",
        **{**defaults, **options},  # type: ignore[arg-type]
    )
    for name, path in (files or {}).items():
        runtime.register(name, path)
    return runtime
