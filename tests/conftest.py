"""The devices every test of the runtime runs on, each under the checking driver."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_model
from cuda_calls import Cuda
from cuda_runtime import SIZES
from hypothesis import Phase, settings

from warmserve_rt import Model, Runtime, _native, testing
from warmserve_rt.testing.simcuda import SimulatedCuda

# Engines are tested where they are installed, by `.ci/engine_tests`.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["engines/with_vllm/*"]

# Where these are set pytest writes out differences whole: hours, for a layer's bytes.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)

settings.register_profile("first-failure", phases=[Phase.explicit, Phase.reuse, Phase.generate])


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """What the tests import, and what those of earlier files left (compilers leave millions of
    objects), stays to the end: gc.collect() need not look at it each time."""
    gc.collect()
    gc.freeze()


def bytes_of(runtime: Runtime, model: Model | str, tensor: str) -> bytes:
    """What the device holds of a tensor: through its view where the CPU can read it, else copied
    back."""
    model = runtime.model(model)
    view = runtime.tensors(model)[tensor]
    if isinstance(view, np.ndarray):
        return view.tobytes()
    spec = model.layout.tensors[tensor]
    layer = runtime.read_back(model, spec.layer)
    return layer[spec.offset : spec.offset + spec.nbytes].tobytes()


def address_of(tensor: Any) -> int:
    return tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.address


class Device:
    """Makes runtimes on one kind of device, and at the end holds them to its contracts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host_view = name == "host"
        self.cuda = name in ("simcuda", "cuda:0")  # addresses are no CPU's
        self.steps = not self.cuda  # streams of a pump move when they are stepped
        self.tensors = "dlpack" if self.cuda else "numpy"
        self.simulation: dict[str, Any] = {}  # options of simulated_cuda
        self.simulated: SimulatedCuda | None = None
        self._made: list[tuple[Runtime, testing.Watched]] = []
        self._open, self._pinned = ExitStack(), ExitStack()

    def watch(self, *, pump: bool = False) -> testing.Watched:
        if self.name == "cuda:0":
            return testing.watch("cuda:0")
        if self.name != "simcuda":
            return testing.watch(pump=pump, host_view=self.host_view)
        if not self.simulated:  # without threads it is deterministic
            clock = "virtual" if pump else "real"
            options = {"clock": clock, **self.simulation}
            self.simulated = self._open.enter_context(testing.simulated_cuda(**options))
        return testing.watch(cuda=self.simulated)

    def runtime(self, **options: Any) -> Runtime:
        return self.watched_runtime(**options)[0]

    def watched_runtime(self, **options: Any) -> tuple[Runtime, testing.Watched]:
        watched = self.watch(pump=options.get("pump", False))
        options.setdefault("arena", "16MiB")
        options.setdefault("staging", "4MiB")
        options.setdefault("chunk", "2MiB")
        options.setdefault("tensors", self.tensors)
        runtime = Runtime(driver=watched.driver, **options)
        self._made.append((runtime, watched))
        return runtime, watched

    def pinned(self, nbytes: int) -> Any:
        """Host memory that copies may write while the caller goes on; it lasts as the device."""
        if not self.cuda:
            return np.zeros(nbytes, np.uint8)
        raw = Cuda(self.simulated.library if self.simulated else "libcuda.so.1").start()
        memory = raw.pinned(nbytes)
        self._pinned.callback(raw.release_primary)
        self._pinned.callback(raw.unregister, memory.address)
        return memory.view

    def hold_up(self, stream: _native.Stream) -> None:
        """On a GPU, which would be done at once: what comes next in a stream waits for a second."""
        if self.name == "cuda:0":
            Cuda("libcuda.so.1").sleep(stream.handle, 1_000_000)

    def finish(self) -> None:
        try:
            for runtime, _ in self._made:
                runtime.close()
            watched = [watched for _, watched in self._made]
            self._made.clear()
            runtime = None
            self._pinned.close()
            gc.collect()
            for one in watched:
                one.check()
        finally:
            self._open.close()
            self.simulated = None


# For what reads tensors with the CPU.
on_the_host = pytest.mark.parametrize("device", ["host", "host-staged"], indirect=True)


def _gpu() -> list[str]:
    """A real GPU, where there is one. Looked for in another process: CUDA that has begun here would
    be in the way of tests that fork."""
    look = "from warmserve_rt import _native; _native.cuda_driver()"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, cwd="/")
    return [] if found.returncode else ["cuda:0"]


@pytest.fixture(params=["host", "host-staged", "simcuda", *_gpu()])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    made = Device(request.param)
    yield made
    made.finish()


@pytest.fixture
def cuda() -> Iterator[SimulatedCuda]:
    with testing.simulated_cuda(memory="64MiB") as simulated:
        yield simulated


@pytest.fixture
def two_files(tmp_path: Path) -> dict[str, Path]:
    """Checkpoints of two models of the sizes of cuda_runtime.SIZES."""
    return {name: write_model(tmp_path / name, name, SIZES) for name in "ab"}
