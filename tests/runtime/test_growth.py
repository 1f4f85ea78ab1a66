"""Risk: the cost of an operation grows with the square of the number of layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import write_model, write_safetensors

from warmserve_rt import FOREGROUND, LayerSnapshot, Runtime, testing

GRANULE = 64 << 10


def _operations(runtime: Runtime) -> int:
    """Return the driver calls plus the layers examined to find room or work; no clock is used."""
    calls = sum(count for count, _ in runtime.native.driver_calls().values())
    return calls + runtime.native.state().layers_examined


def _prewarm(runtime: Runtime) -> None:
    runtime.prewarm("a", layers=range(len(runtime.model("a").layers))).wait()


def _swap(runtime: Runtime) -> None:
    runtime.prewarm("a").wait()
    runtime.swap(evict="a", load="b").wait()


def _replace(runtime: Runtime) -> None:
    """Make room layer by layer, in the order of eviction."""
    runtime.prewarm("a").wait()
    with runtime.lease("b"):
        pass


def _replace_what_is_kept(runtime: Runtime) -> None:
    """Load a model whose own layers come first in the order of eviction but must be kept."""
    runtime.prewarm("b").wait()
    runtime.set_keep_value("a", -1.0)
    runtime.prewarm("a").wait()


def _lease_in_parts(runtime: Runtime) -> None:
    """Lease one layer after the other; each takes the room of an earlier one."""
    for layer in range(len(runtime.model("a").layers)):
        with runtime.lease("a", layers=[layer]):
            pass
    for layer in range(len(runtime.model("b").layers)):
        with runtime.lease("b", layers=[layer]):
            pass


def _load_beside_background(runtime: Runtime) -> None:
    half = range(len(runtime.model("a").layers) // 2)
    tickets = [
        runtime.prewarm("b", layers=half),
        runtime.prewarm("a", layers=half, priority=FOREGROUND),
    ]
    for ticket in tickets:
        ticket.wait()


def _load_instead_of_background(runtime: Runtime) -> None:
    """Let background loads take all the room before a foreground load begins."""
    background = runtime.prewarm("b")
    while runtime.snapshot().bytes_loaded < 256 * 10:
        runtime.step()
    runtime.prewarm("a", priority=FOREGROUND).wait()
    background.cancel()


def _trim(runtime: Runtime) -> None:
    runtime.prewarm("a").wait()
    runtime.evict("a")
    runtime.trim()
    runtime.prewarm("b").wait()


@pytest.mark.parametrize(
    "work",
    [
        _prewarm,
        _swap,
        _replace,
        _replace_what_is_kept,
        _lease_in_parts,
        _load_beside_background,
        _load_instead_of_background,
        _trim,
    ],
)
def test_twice_the_layers_take_twice_the_operations(
    tmp_path: Path, work: Callable[[Runtime], None]
) -> None:
    taken = []
    for layers in (100, 200):
        tensors = {f"model.layers.{i}.weight": ("U8", [256], bytes(256)) for i in range(layers)}
        file = write_safetensors(tmp_path / f"{layers}.safetensors", tensors)
        with (
            testing.simulated_cuda(granularity=GRANULE, clock="virtual") as cuda,
            Runtime(
                arena=layers * GRANULE,
                granule=GRANULE,
                max_padding=1,
                chunk=GRANULE,
                staging=4 * GRANULE,
                pump=True,
                background_share=0.5,
                tensors="dlpack",
                driver=testing.cuda_driver(cuda),
            ) as runtime,
        ):
            for name in ("a", "b"):
                runtime.register(name, file)
            before = _operations(runtime)
            work(runtime)
            taken.append(_operations(runtime) - before)
            runtime.check_invariants()
    assert taken[0] > 100
    assert taken[1] < 2.3 * taken[0], taken


def test_a_snapshot_holds_every_layer_as_a_plain_value(tmp_path: Path) -> None:
    with Runtime(arena="8MiB", tensors="numpy") as runtime:
        runtime.register("m", write_model(tmp_path / "m.safetensors", "m", [10, 3 << 20]))
        runtime.prewarm("m", layers=[1]).wait()
        runtime.set_keep_value("m", 0.5, layer=1)
        layers = runtime.snapshot().models["m"].layers
        assert all(type(layer) is LayerSnapshot for layer in layers)
        assert layers == (
            LayerSnapshot("absent", 10, 1, 0, 0.0, False),
            LayerSnapshot(
                residency="resident",
                nbytes=3 << 20,
                granules=2,
                leases=0,
                keep_value=0.5,
                cached=False,
            ),
        )
