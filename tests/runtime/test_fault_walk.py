"""Risk: a driver call fails, and afterwards memory is lost, a layer torn, or the runtime unusable.

Every public operation runs with its first driver call failing, then with its second, and so on,
until it completes without a fault. Four modes say which calls fail: that call alone, that call and
all later ones, or that call and one inside the rollback. After each run the invariants hold, other
models serve and a retry succeeds. At the end no resource is left.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_model
from conftest import Device, bytes_of

from warmserve_rt import Runtime, WarmServeError, testing

SIZES = {"one": [GRANULE + 5, 100], "two": [3 * GRANULE, 7], "bystander": [1000]}
CAPACITY = 6  # "one" and "bystander" fit, "one" and "two" do not
MODES: dict[str, Callable[[int], list[tuple[int, int | None]]]] = {
    "once": lambda n: [(n, n)],
    "from-then-on": lambda n: [(n, None)],
    "and-in-rollback": lambda n: [(n, n), (n + 1, n + 1)],
    "and-later-in-rollback": lambda n: [(n, n), (n + 2, n + 2)],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, name, sizes) for name, sizes in SIZES.items()}


def make(
    device: Device, files: dict[str, Path], watched: testing.Watched, host_cache: str | int = 0
) -> Runtime:
    runtime = Runtime(
        arena=CAPACITY * GRANULE,
        granule=GRANULE,
        max_padding=1,
        staging=2 * GRANULE,
        chunk=GRANULE,
        host_cache=host_cache,
        staging_timeout=0.25,
        pump=True,
        tensors=device.tensors,
        driver=watched.driver,
    )
    for name, path in files.items():
        runtime.register(name, path)
    return runtime


def check_content(runtime: Runtime, name: str) -> None:
    with runtime.lease(name) as lease:
        for tensor in lease.tensors:
            layer = int(tensor.split(".")[2])
            assert bytes_of(runtime, name, tensor) == content(name, layer, SIZES[name][layer])


def check_residents(runtime: Runtime) -> None:
    """Check that every resident layer is complete."""
    for name, model in runtime.snapshot().models.items():
        for index, layer in enumerate(model.layers):
            if layer.residency == "resident":
                read = runtime.read_back(name, index).tobytes()
                assert read == content(name, index, SIZES[name][index])


def prewarm(runtime: Runtime) -> None:
    runtime.prewarm("one").wait()


def lease(runtime: Runtime) -> None:
    with runtime.lease(["one", "bystander"]):
        pass


def lease_that_evicts(runtime: Runtime) -> None:
    with runtime.lease("two"):
        pass


def lease_on_a_stream(runtime: Runtime) -> None:
    stream = runtime.stream()
    lease = runtime.lease("one")
    lease.acquire(stream)
    out = np.zeros(100, np.uint8)
    try:
        view = runtime.model("one").layer_bytes(1, 0, 100)
        stream.copy_from(out, view)
        lease.record(stream)
    finally:
        try:
            lease.release()
        finally:
            stream.synchronize()
    runtime.evict("one")
    assert out.tobytes() == content("one", 1, 100)


kept: list[object] = []  # targets of copies that a failed call left running


def stream_in(runtime: Runtime) -> None:
    stream = runtime.stream()
    outs = {layer: np.zeros(min(SIZES["two"][layer], GRANULE), np.uint8) for layer in (0, 1)}
    kept.append(outs)
    try:
        with runtime.lease("two", streaming=True) as lease:
            for layer, out in outs.items():
                lease.wait(layer, stream)
                nbytes = out.nbytes
                view = runtime.model("two").layer_bytes(layer, 0, nbytes)
                stream.copy_from(out, view)
                lease.record(stream)
    finally:
        stream.synchronize()
    for layer, out in outs.items():
        assert out.tobytes() == content("two", layer, out.nbytes)


def some_layers(runtime: Runtime) -> None:
    runtime.evict("one", keep=[1])
    runtime.prewarm("two", layers=[1]).wait()
    with runtime.lease("one", layers=1):
        runtime.evict("two", layers=[1], wait="nothing")


def evict(runtime: Runtime) -> None:
    runtime.evict("one")


def swap(runtime: Runtime) -> None:
    runtime.swap(evict="one", load="two").wait()


def trim(runtime: Runtime) -> None:
    runtime.trim()


def grow_again(runtime: Runtime) -> None:
    runtime.evict("one")
    runtime.trim()
    runtime.prewarm("two").wait()


def unregister(runtime: Runtime) -> None:
    if any(model.name == "one" for model in runtime.models):
        runtime.unregister("one")


def read_back(runtime: Runtime) -> None:
    if runtime.snapshot().models["bystander"].resident:
        assert runtime.read_back("bystander", 0).tobytes() == content("bystander", 0, 1000)


def cancel(runtime: Runtime) -> None:
    ticket = runtime.prewarm("two")
    runtime.step()
    runtime.step()
    ticket.cancel()
    while runtime.step():
        pass
    if any(layer.residency == "filling" for layer in runtime.snapshot().models["two"].layers):
        raise WarmServeError("still being undone")


def step_by_step(runtime: Runtime) -> None:
    """Step on after the ticket has failed, so that later steps meet the faults as well."""
    ticket = runtime.prewarm("two")
    while runtime.step():
        pass
    ticket.wait(20)


def load_into_the_host_cache(runtime: Runtime) -> None:
    runtime.prewarm("one").wait()


def load_from_the_host_cache(runtime: Runtime) -> None:
    runtime.evict("one")
    runtime.prewarm("one").wait()


CACHED = (load_into_the_host_cache, load_from_the_host_cache)
OPERATIONS = [
    (prewarm, ()),
    (lease, ()),
    (lease_that_evicts, ("one",)),
    (lease_on_a_stream, ("one",)),
    (stream_in, ("one",)),
    (some_layers, ("one",)),
    (evict, ("one", "bystander")),
    (swap, ("one",)),
    (trim, ("bystander",)),
    (grow_again, ("one",)),
    (unregister, ("one",)),
    (read_back, ("bystander",)),
    (cancel, ("one",)),
    (step_by_step, ("one",)),
    (load_into_the_host_cache, ()),
    (load_from_the_host_cache, ("one",)),
]


def attempt(
    watched: testing.Watched, ranges: list[tuple[int, int | None]], run: Callable[[], None]
) -> bool:
    """Run with these faults; return whether one was injected."""
    faults = watched.finest_faults
    faults.arm(ranges)
    try:
        run()
    except WarmServeError:
        assert faults.injected, "the operation failed without an injected fault"
    injected = faults.injected > 0
    faults.disarm()
    return injected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("operation", "resident"), OPERATIONS, ids=[operation.__name__ for operation, _ in OPERATIONS]
)
def test_a_failing_driver_call_loses_nothing(
    device: Device,
    files: dict[str, Path],
    operation: Callable[[Runtime], None],
    resident: tuple[str, ...],
    mode: str,
) -> None:
    for call in range(1, 500):
        watched = device.watch(pump=True)
        runtime = make(device, files, watched, "8MiB" if operation in CACHED else 0)
        for name in resident:
            runtime.prewarm(name).wait()
        injected = attempt(watched, MODES[mode](call), partial(operation, runtime))
        runtime.check_invariants()
        check_residents(runtime)
        assert not watched.strict.violations
        check_content(runtime, "bystander")
        operation(runtime)  # the retry
        runtime.check_invariants()
        check_residents(runtime)
        for name in [model.name for model in runtime.models]:
            check_content(runtime, name)
        runtime.close()
        del runtime
        gc.collect()
        watched.check()
        if not injected:
            assert call > 1, "the operation makes no driver call"
            return
    raise AssertionError("the operation meets faults even after its 499th driver call")


@pytest.mark.parametrize("mode", MODES)
def test_a_runtime_that_cannot_be_made_leaves_nothing(
    device: Device, files: dict[str, Path], mode: str
) -> None:
    made = None
    for call in range(1, 500):
        watched = device.watch(pump=True)
        watched.finest_faults.arm(MODES[mode](call))
        try:
            made = make(device, {}, watched)
        except WarmServeError:
            watched.finest_faults.disarm()
            gc.collect()
            # In the mode from-then-on the driver refused the releases, so its objects remain.
            watched.check(closed=mode != "from-then-on")
            continue
        watched.finest_faults.disarm()
        made.close()
        return
    raise AssertionError("making a runtime meets faults even after its 499th driver call")


@pytest.mark.parametrize("mode", MODES)
def test_a_close_that_fails_goes_on_when_called_again(
    device: Device, files: dict[str, Path], mode: str
) -> None:
    for call in range(1, 500):
        watched = device.watch(pump=True)
        runtime = make(device, files, watched)
        runtime.prewarm("one").wait()
        native = runtime.native
        injected = attempt(watched, MODES[mode](call), runtime.close)
        if runtime._open is not None:
            runtime.close()
        del runtime, native
        gc.collect()
        watched.check()
        if not injected:
            return
    raise AssertionError("close() meets faults even after its 499th driver call")


def test_the_walk_leaves_no_descriptors_and_no_mappings(
    device: Device, files: dict[str, Path]
) -> None:
    def count() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("memfd:warmserve")

    before = count()
    for call in range(1, 40):
        watched = device.watch(pump=True)
        runtime = make(device, files, watched)
        attempt(watched, [(call, None)], partial(lease, runtime))
        runtime.close()
        del runtime, watched
        gc.collect()
    assert count() == before
