"""Risk: a load that also uses a peer's host link loads wrong bytes, loses bytes when the
peer fails, or is no faster."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GRANULE, write_safetensors

from warmserve_rt import FOREGROUND, Runtime, WarmServeError, _native, testing
from warmserve_rt.testing.simcuda import SimulatedCuda

LAYERS, LAYER = 6, 4 * GRANULE
CHUNK = GRANULE
LOST = 700  # CUDA_ERROR_ILLEGAL_ADDRESS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Return the path of a checkpoint of LAYERS layers, and the bytes of each layer."""
    random = np.random.default_rng(1)
    layers = [random.bytes(LAYER) for _ in range(LAYERS)]
    path = tmp_path_factory.mktemp("routes") / "model.safetensors"
    write_safetensors(
        path,
        {f"model.layers.{i}.weight": ("U8", (LAYER,), content) for i, content in enumerate(layers)},
    )
    return path, layers


def make(
    cuda: SimulatedCuda, path: Path, *, ordinal: int = 0, routes: bool = True, **options: object
) -> Runtime:
    """Return a runtime on one of two devices; with ``routes``, the other one is a route to it."""
    other = 1 - ordinal
    runtime = Runtime(
        driver=testing.cuda_driver(cuda, ordinal, peers=[other] if routes else []),
        arena=LAYERS * LAYER,
        granule="2MiB",
        max_padding=1,
        staging=16 * CHUNK,
        chunk=CHUNK,
        tensors="dlpack",
        routes=[testing.cuda_driver(cuda, other)] if routes else [],
        **options,  # type: ignore[arg-type]
    )
    runtime.register("m", path)
    return runtime


def load(runtime: Runtime, layers: list[bytes], *, priority: int = FOREGROUND) -> float:
    """Load the model, check its bytes, and return the seconds that the load took."""
    runtime.evict("m")
    begin = time.perf_counter()
    runtime.prewarm("m", priority=priority).wait(60)
    took = time.perf_counter() - begin
    for index, content in enumerate(layers):
        assert runtime.read_back("m", index).tobytes() == content
    return took


def test_a_load_goes_over_both_links(model: tuple[Path, list[bytes]]) -> None:
    path, layers = model
    with (
        testing.simulated_cuda(devices=2, peers=True, leaks=True) as cuda,
        make(cuda, path) as runtime,
    ):
        load(runtime, layers)
        (by,) = runtime.snapshot().routes
        assert (by.name, by.error) == ("cuda:1 (Simulated CUDA)", "")
        assert 0 < by.nbytes < LAYERS * LAYER
        assert by.bandwidth > 0
        assert cuda.copied["d2d"] == by.nbytes
        assert cuda.copied["h2d"] == LAYERS * LAYER


def test_two_links_of_one_speed_nearly_halve_the_time(model: tuple[Path, list[bytes]]) -> None:
    """Take the best of three loads, because other work shares the machine."""
    path, layers = model
    seconds = {}
    for routes in (False, True):
        with (
            testing.simulated_cuda(devices=2, peers=True, h2d=200e6, d2d=5e9) as cuda,
            make(cuda, path, routes=routes, loaders=2) as runtime,
        ):
            load(runtime, layers)  # measures the speeds of the links
            seconds[routes] = min(load(runtime, layers) for _ in range(3))
    assert seconds[False] / seconds[True] > 1.5


def test_a_background_load_uses_no_route(model: tuple[Path, list[bytes]]) -> None:
    path, layers = model
    with testing.simulated_cuda(devices=2, peers=True) as cuda, make(cuda, path) as runtime:
        load(runtime, layers, priority=0)
        assert runtime.snapshot().routes[0].nbytes == 0


def test_a_peer_whose_context_dies_costs_no_bytes(model: tuple[Path, list[bytes]]) -> None:
    path, layers = model
    with (  # the peer's first piece takes a second, so it dies with a copy in progress
        testing.simulated_cuda(devices=2, peers=True, h2d=400e6, d2d=2e6) as cuda,
        make(cuda, path, ordinal=1) as runtime,
    ):
        runtime.evict("m")
        ticket = runtime.prewarm("m", priority=FOREGROUND)
        while not ticket.progress[0]:
            time.sleep(0.001)
        cuda.break_context(LOST)  # breaks the context of device 0, the peer
        ticket.wait(60)
        for index, content in enumerate(layers):
            assert runtime.read_back("m", index).tobytes() == content
        assert "700" in runtime.snapshot().routes[0].error
        load(runtime, layers)


@pytest.mark.parametrize("function", ["cuMemcpyDtoDAsync_v2", "cuEventRecord", "cuEventQuery"])
@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_a_failing_call_on_any_link_loses_no_bytes(
    model: tuple[Path, list[bytes]], function: str, status: str
) -> None:
    """A load that an error on the device's own link ends is repeated.

    The fault injector counts the calls of both devices.
    """
    path, layers = model
    with testing.simulated_cuda(devices=2, peers=True) as cuda, make(cuda, path) as runtime:
        for call in (1, 2, 5):
            cuda.faults.arm([(call, call)], only=function, status=status)
            if function == "cuMemcpyDtoDAsync_v2":  # only routes call this function
                load(runtime, layers)
                break
            try:
                load(runtime, layers)
            except WarmServeError:
                load(runtime, layers)
        cuda.faults.disarm()


def test_a_stream_waits_for_a_layer_that_came_over_a_peer_s_link(
    model: tuple[Path, list[bytes]],
) -> None:
    path, layers = model
    with (
        testing.simulated_cuda(devices=2, peers=True, h2d=400e6) as cuda,
        make(cuda, path) as runtime,
    ):
        stream = runtime.stream()
        with runtime.lease("m", streaming=True) as lease:
            for index, content in enumerate(layers):
                lease.wait(index, stream)
                out = bytearray(LAYER)
                view = runtime.model("m").layer_bytes(index, 0, LAYER)
                stream.copy_from(out, view)
                stream.synchronize()
                assert out == content
        assert runtime.snapshot().routes[0].nbytes > 0


def test_a_dropped_route_carries_no_further_bytes(model: tuple[Path, list[bytes]]) -> None:
    path, layers = model
    with (
        testing.simulated_cuda(devices=2, peers=True, leaks=True, h2d=400e6) as cuda,
        make(cuda, path) as runtime,
    ):
        ticket = runtime.prewarm("m", priority=FOREGROUND)
        while not ticket.progress[0]:
            time.sleep(0.001)
        runtime.native.drop_route("cuda:1 (Simulated CUDA)")
        assert runtime.snapshot().routes == ()
        ticket.wait(60)
        del ticket  # a ticket keeps its runtime alive
        load(runtime, layers)
        with pytest.raises(ValueError, match="unknown route"):
            runtime.native.drop_route("cuda:1 (Simulated CUDA)")


def test_a_device_that_is_no_peer_is_refused() -> None:
    with (
        testing.simulated_cuda(devices=2) as cuda,
        pytest.raises(ValueError, match="cuda:1 does not reach the memory of cuda:0"),
    ):
        testing.cuda_driver(cuda, peers=[1])


def test_invalid_peers_are_refused() -> None:
    with testing.simulated_cuda(devices=2, peers=True) as cuda:
        with pytest.raises(ValueError, match="no device cuda:2"):
            testing.cuda_driver(cuda, peers=[2])
        with pytest.raises(ValueError, match="cuda:0 does not reach the memory of cuda:0"):
            testing.cuda_driver(cuda, peers=[0])


def test_a_peer_without_access_is_refused() -> None:
    with testing.simulated_cuda(devices=2, peers=True) as cuda:
        own, other = testing.cuda_driver(cuda), testing.cuda_driver(cuda, 1)
        with pytest.raises(ValueError, match=r"cuda:1 .* has no access to the memory of cuda:0"):
            Runtime(driver=own, arena="16MiB", tensors="dlpack", routes=[other])


def test_a_repeated_route_is_refused() -> None:
    with testing.simulated_cuda(devices=2, peers=True) as cuda:
        own, other = testing.cuda_driver(cuda, peers=[1]), testing.cuda_driver(cuda, 1)
        with pytest.raises(ValueError, match=r"'cuda:1 .*' exists already"):
            Runtime(driver=own, arena="16MiB", tensors="dlpack", routes=[other, other])


@pytest.mark.parametrize(
    ("device", "routes", "why"),
    [
        ("host", ["cuda:1"], "no route 'cuda:1' to 'host'"),
        ("cuda:0", ["host"], "route 'host' must be 'cuda:N'"),
        ("cuda:0", ["cuda"], "route 'cuda' must be 'cuda:N'"),
        ("cuda:0", ["cuda:1", "cuda:1"], "named twice"),
    ],
)
def test_invalid_routes_are_refused(device: str, routes: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Runtime(device, arena="8MiB", routes=routes)


def test_the_host_device_accepts_no_routes() -> None:
    with pytest.raises(ValueError, match="over no link"):
        Runtime(arena="8MiB", routes=[_native.host_driver()])
