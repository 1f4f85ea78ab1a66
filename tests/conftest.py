"""Fixtures: the devices that every runtime test runs on, each under the checking driver."""

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
from cuda_runtime import SIZES
from hypothesis import Phase, settings

from processes import SIZES as SHARED_SIZES
from processes import Processes
from warmserve_rt import Model, Runtime, _native, testing
from warmserve_rt.testing.cuda_api import Cuda
from warmserve_rt.testing.simcuda import SimulatedCuda

# Tests with vLLM are collected only if vLLM is installed; `.ci/engine_tests` runs them.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["engines/with_vllm/*"]

# If these variables are set, pytest prints differences in full, which takes hours for the bytes of
# a layer.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)

settings.register_profile("first-failure", phases=[Phase.explicit, Phase.reuse, Phase.generate])


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """Freeze all objects alive before a test file, so that gc.collect() does not scan them.

    They live to the end of the run: imported modules, and the objects that earlier test files
    left. Compilers leave millions.
    """
    gc.collect()
    gc.freeze()


def bytes_of(runtime: Runtime, model: Model | str, tensor: str) -> bytes:
    """Return a tensor's bytes on the device: by its view if the CPU can read it, else a copy."""
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
    """A factory of runtimes on one kind of device; finish() checks the driver's contracts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host_view = name == "host"
        self.cuda = name in ("simcuda", "cuda:0")  # the CPU cannot read device addresses
        self.steps = not self.cuda  # with pump=True, streams advance only when stepped
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
        if not self.simulated:  # a pumped runtime has no threads: a virtual clock is deterministic
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
        options.setdefault("granule", "2MiB")  # so that models have the same layers on each device
        options.setdefault("max_padding", 1)
        runtime = Runtime(driver=watched.driver, **options)
        self._made.append((runtime, watched))
        return runtime, watched

    def pinned(self, nbytes: int) -> Any:
        """Return host memory that asynchronous copies can write. It lives as long as the device."""
        if not self.cuda:
            return np.zeros(nbytes, np.uint8)
        raw = Cuda(self.simulated.library if self.simulated else "libcuda.so.1").start()
        memory = raw.pinned(nbytes)
        self._pinned.callback(raw.release_primary)
        self._pinned.callback(raw.unregister, memory.address)
        return memory.view

    def hold_up(self, stream: _native.Stream) -> None:
        """On a real GPU, delay the following work of a stream by a second; else do nothing."""
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


# For tests that read tensors with the CPU.
on_the_host = pytest.mark.parametrize("device", ["host", "host-staged"], indirect=True)


def _gpu() -> list[str]:
    """Return the name of a real GPU in a list, or an empty list if none is found.

    Another process looks for it, because tests fork and CUDA must not be initialised before a fork.
    """
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
    """Return the checkpoints of two models, each with layers of cuda_runtime.SIZES."""
    return {name: write_model(tmp_path / name, name, SIZES) for name in "ab"}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Processes]:
    """Return the processes of a test of brokers and clients."""
    made = Processes(tmp_path / "run" / "broker.sock")
    yield made
    made.end()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the checkpoints of three models of 4 granules each, for brokers."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, name, SHARED_SIZES) for name in "abc"}
