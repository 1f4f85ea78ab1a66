"""Risk: a layer is evicted although another is worth less, or for a load that is worth less."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from checkpoints import GRANULE, write_model
from conftest import Device

from warmserve_rt import Busy, Runtime

LAYERS = {"a": 3, "b": 3, "c": 4}


@pytest.fixture
def runtime(device: Device, tmp_path: Path) -> Runtime:
    """Return a pumped runtime with room for six granules, in which a and b are resident."""
    made = device.runtime(arena=6 * GRANULE, chunk=GRANULE, staging=2 * GRANULE, pump=True)
    for name, count in LAYERS.items():
        made.register(name, write_model(tmp_path / name, name, [GRANULE] * count))
    made.prewarm("a").wait(20)
    made.prewarm("b").wait(20)
    return made


def resident(runtime: Runtime) -> dict[str, list[int]]:
    """Return the resident layers of each model."""
    return {
        name: [i for i, layer in enumerate(model.layers) if layer.residency == "resident"]
        for name, model in runtime.snapshot().models.items()
    }


def test_a_model_loses_its_last_layers_first_among_equal_values(runtime: Runtime) -> None:
    """Also if its last layer was loaded last."""
    runtime.set_keep_value("a", -1.0)
    runtime.prewarm("c", layers=2).wait(20)
    assert resident(runtime) == {"a": [0], "b": [0, 1, 2], "c": [0, 1]}


def test_the_least_recently_used_model_loses_first_among_equal_values(
    runtime: Runtime,
) -> None:
    with runtime.lease("a"):
        pass
    runtime.prewarm("c", layers=3).wait(20)
    assert resident(runtime) == {"a": [0, 1, 2], "b": [], "c": [0, 1, 2]}


def test_each_layer_gets_its_value(runtime: Runtime) -> None:
    runtime.set_keep_values("a", [1.0, -2.0, 1.0])
    runtime.set_keep_values("b", [0.0, 1.0, -1.0])
    runtime.prewarm("c", layers=3).wait(20)
    assert resident(runtime) == {"a": [0, 2], "b": [1], "c": [0, 1, 2]}


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0] * 4, [], [1.0, math.nan, 1.0]])
def test_values_that_do_not_fit_the_model_change_nothing(
    runtime: Runtime, values: list[float]
) -> None:
    with pytest.raises(ValueError, match=r"3 layers: give as many keep values|must be a number"):
        runtime.set_keep_values("a", values)
    assert [layer.keep_value for layer in runtime.snapshot().models["a"].layers] == [0.0] * 3


def test_a_load_evicts_only_layers_below_its_limit(runtime: Runtime) -> None:
    runtime.set_keep_values("a", [2.0, 1.0, 0.5])
    runtime.set_keep_values("b", [2.0, 2.0, 0.9])
    runtime.prewarm("c", layers=2, evict_below=1.0).wait(20)
    assert resident(runtime) == {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    with pytest.raises(Busy, match="of a keep value of evict_below or more"):
        runtime.prewarm("c", layers=3, evict_below=1.0)
    assert resident(runtime) == {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    assert not runtime.step()


def test_a_limited_load_is_refused_as_a_whole(runtime: Runtime) -> None:
    runtime.set_keep_values("a", [1.0, 1.0, 0.0])
    runtime.set_keep_value("b", 1.0)
    before = resident(runtime)
    with pytest.raises(Busy):
        runtime.prewarm("c", layers=2, evict_below=1.0)
    with pytest.raises(Busy):
        runtime.prewarm("c", layers=1, evict_below=-math.inf)
    assert resident(runtime) == before


def test_two_limited_loads_do_not_count_the_same_room(runtime: Runtime) -> None:
    runtime.set_keep_values("a", [2.0, 2.0, 0.0])
    runtime.set_keep_value("b", 2.0)
    first = runtime.prewarm("c", layers=[0], evict_below=1.0)
    with pytest.raises(Busy):
        runtime.prewarm("c", layers=[1], evict_below=1.0)
    first.wait(20)
    assert resident(runtime)["c"] == [0]


def test_the_limit_holds_when_the_load_makes_room_later(runtime: Runtime) -> None:
    runtime.set_keep_value("a", 0.0)
    runtime.set_keep_value("b", 2.0)
    ticket = runtime.prewarm("c", layers=3, evict_below=1.0)
    runtime.set_keep_value("a", 5.0)
    with pytest.raises(Busy):
        ticket.wait(20)
    assert resident(runtime) == {"a": [0, 1, 2], "b": [0, 1, 2], "c": []}


def test_a_lease_that_wants_the_same_layers_lifts_the_limit(runtime: Runtime) -> None:
    runtime.set_keep_value("a", 0.0)
    runtime.set_keep_value("b", 2.0)
    ticket = runtime.prewarm("c", layers=3, evict_below=1.0)
    runtime.set_keep_value("a", 5.0)
    with runtime.lease("c"):
        ticket.wait(20)
        assert resident(runtime) == {"a": [0, 1], "b": [], "c": [0, 1, 2, 3]}


def test_a_limit_that_is_no_number_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="evict_below must be a number, got nan"):
        runtime.prewarm("c", evict_below=math.nan)
    with pytest.raises(TypeError, match="evict_below must be a number, got 'x'"):
        runtime.prewarm("c", evict_below="x")  # type: ignore[arg-type]
