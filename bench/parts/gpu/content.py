"""Checks that a CUDA device has the file's bytes: by reading back, digests and captured graphs."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from lib.cuda import Gate, Gpu, code
from lib.harness import seconds
from parts.gpu.part import GRANULE, NotRun, Part, arena_for, layer_address, layer_bytes
from warmserve_rt import Model, Runtime, WarmServeError


@contextmanager
def _two_models(part: Part) -> Iterator[tuple[Runtime, Model, Model]]:
    """Yield two small models in an arena for one, so that each must be swapped for the other."""
    with part.runtime(arena=arena_for(part, "small_a", "small_b"), staging="32MiB") as runtime:
        a, b = part.register(runtime, "small_a", "small_b")
        yield runtime, a, b


def content(part: Part) -> None:
    """Copy all of a model back after swaps and compare it with the file."""
    with _two_models(part) as (runtime, a, b):
        for evict, incoming in ((a, b), (b, a)):
            runtime.swap(evict=evict, load=incoming).wait()
            path = part.path(incoming.name)
            differing = sum(
                not np.array_equal(
                    runtime.read_back(incoming, layer.index),
                    layer_bytes(incoming, path, layer.index),
                )
                for layer in incoming.layers
            )
            part.target(f"layers_differing_{incoming.name}", differing, "layers", "=", 0)


def digest(part: Part) -> None:
    from warmserve_rt.kernels import granule_digest

    with _two_models(part) as (runtime, a, b):
        runtime.swap(evict=b, load=a).wait()
        differing, granules, speeds = 0, 0, []
        for layer in a.layers:
            try:
                taken = seconds(partial(runtime.digest, a, layer.index))
                found = runtime.digest(a, layer.index)
            except WarmServeError as error:
                raise NotRun(str(error)) from None
            wanted = granule_digest(layer_bytes(a, part.path(a.name), layer.index), GRANULE)
            differing += int(np.count_nonzero(found != wanted))
            granules += len(wanted)
            speeds.append(layer.nbytes / taken / 1e9)
        part.row("digested_granules", granules, "granules")
        part.row("digest_gb_per_s", statistics.median(speeds), "GB/s")
        part.target("digests_differing", differing, "granules", "=", 0)


class _Replay:
    """A graph that copies all layers of a model to pinned memory."""

    def __init__(self, cuda: Gpu, model: Model) -> None:
        self.cuda, self.stream = cuda, cuda.stream()
        self.out = [cuda.pinned(-(-layer.nbytes // 4096) * 4096) for layer in model.layers]
        self.sizes = [layer.nbytes for layer in model.layers]
        cuda.begin_capture(self.stream)
        for layer, out in zip(model.layers, self.out, strict=True):
            address = layer_address(model, layer.index)
            cuda.dtoh(out.address, address, layer.nbytes, self.stream)
        self.graph = cuda.instantiate(cuda.end_capture(self.stream))

    def forget(self) -> None:
        for out, size in zip(self.out, self.sizes, strict=True):
            out[:size] = bytes(size)

    def run(self) -> None:
        self.cuda.graph_launch(self.graph, self.stream)

    def right(self, wanted: list[bytes]) -> bool:
        self.cuda.synchronize(self.stream)
        return all(
            out[:size] == bytes_
            for out, size, bytes_ in zip(self.out, self.sizes, wanted, strict=True)
        )


def graph(part: Part) -> None:
    """Capture a graph under one lease and replay it under others, with other granules mapped."""
    cuda = Gpu()
    with _two_models(part) as (runtime, a, b):
        wanted = [layer_bytes(a, part.path(a.name), x.index).tobytes() for x in a.layers]
        with runtime.lease(a):
            replay = _Replay(cuda, a)
            replay.run()
            part.yes("replay_right", replay.right(wanted))
        epoch = a.backing_epoch
        runtime.swap(evict=a, load=b).wait()
        runtime.swap(evict=b, load=a).wait()
        part.yes("granules_changed", a.backing_epoch != epoch)
        replay.forget()
        with runtime.lease(a):
            replay.run()
            part.yes("replay_right_after_swaps", replay.right(wanted))
        _fence(part, cuda, runtime, a, replay, wanted)


def _fence(
    part: Part, cuda: Gpu, runtime: Runtime, model: Model, replay: _Replay, wanted: list[bytes]
) -> None:
    """Check that pending work on a foreign stream, recorded with a lease, delays the eviction."""
    replay.forget()
    lease = runtime.lease(model).acquire(replay.stream)
    with Gate(cuda, replay.stream, 10):
        replay.run()
        lease.release()
        try:
            runtime.evict(model, timeout=0.3)
            waits = False
        except TimeoutError:
            waits = True
    runtime.evict(model)
    part.yes("eviction_waits_for_recorded_work", waits)
    part.yes("replay_right_before_eviction", replay.right(wanted))


def _use(part: Part) -> None:
    """Make a runtime, perform all operations that call the driver, and close it."""
    with _two_models(part) as (runtime, a, b):
        for evict, incoming in ((b, a), (a, b)):
            runtime.swap(evict=evict, load=incoming).wait(60)
            with runtime.lease(incoming, timeout=60):
                runtime.read_back(incoming, 0)
        runtime.evict(b)
        runtime.trim()


def capture(part: Part) -> None:
    """Check that a foreign capture in the strictest mode survives while a runtime works."""
    cuda = Gpu()
    stream, address = cuda.stream(), cuda.mapped(GRANULE)

    def captured(use: Callable[[], object]) -> tuple[str, int]:
        failed = ""
        cuda.begin_capture(stream)
        cuda.memset(address, 1, 8, stream)
        try:
            use()
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        result = code(cuda.end_capture, stream)
        return failed, result

    def beside() -> None:
        errors: list[BaseException] = []

        def body() -> None:
            try:
                _use(part)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    for name, use in (("another_thread", beside), ("the_capturing_thread", lambda: _use(part))):
        failed, result = captured(use)
        if failed:
            print(f"capture, {name}: {failed}")
        part.yes(f"capture_survives_{name}", result == 0)
        part.yes(f"runtime_works_in_capture_{name}", not failed)
