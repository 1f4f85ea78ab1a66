"""A simulated CUDA device with work of frameworks in flight, and stand-ins for these frameworks."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

from cuda_runtime import make

from warmserve_rt import Runtime, testing
from warmserve_rt.testing.cuda_api import Cuda, code
from warmserve_rt.testing.simcuda import SimulatedCuda


class _Driver:
    def __init__(self, library: Path) -> None:
        self._cuda, self._library = Cuda(library), ctypes.CDLL(str(library))

    def captures(self, stream: int) -> bool:
        if not self._cuda.current():  # the frameworks' calls need no current context
            self._cuda.start()
        status = ctypes.c_int()
        error = self._library.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status))
        if error:
            raise RuntimeError(f"CUDA error {error}")
        return status.value == 1


class TorchStream:
    def __init__(self, handle: int, device_index: int) -> None:
        self.cuda_stream, self.device_index = handle, device_index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchStream) and self.cuda_stream == other.cuda_stream

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "<torch.cuda.Stream>"

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.cuda_stream)


class TorchCuda(ModuleType):
    """`torch.cuda` with the functions that tell of streams."""

    Stream = TorchStream

    def __init__(self, library: Path) -> None:
        super().__init__("torch.cuda")
        self._driver = _Driver(library)
        self.initialized = True
        self.device = 0
        self.current: dict[int, int] = {}  # device: handle of its current stream

    def is_initialized(self) -> bool:
        return self.initialized

    def current_device(self) -> int:
        return self.device

    def current_stream(self, device: int | None = None) -> TorchStream:
        at = self.device if device is None else device
        return TorchStream(self.current.get(at, 0), at)

    def is_current_stream_capturing(self) -> bool:
        return self._driver.captures(self.current_stream().cuda_stream)

    @contextmanager
    def stream(self, stream: TorchStream) -> Iterator[None]:
        device, current = self.device, dict(self.current)
        self.device = stream.device_index
        self.current[self.device] = stream.cuda_stream
        try:
            yield
        finally:
            self.device, self.current = device, current


class CupyStream:
    def __init__(self, driver: _Driver, handle: int) -> None:
        self._driver, self.ptr = driver, handle

    def __repr__(self) -> str:
        return "<cupy.cuda.Stream>"

    def is_capturing(self) -> bool:
        return self._driver.captures(self.ptr)


class CupyCuda(ModuleType):
    """`cupy.cuda` with the functions that tell of streams."""

    def __init__(self, library: Path) -> None:
        super().__init__("cupy.cuda")
        self._driver = _Driver(library)
        self.current: dict[int, int] = {}  # device: handle of its current stream
        self.runtime = SimpleNamespace(CUDARuntimeError=_CupyError)
        self.broken = False

    def get_current_stream(self, device_id: int = -1) -> CupyStream:
        if self.broken:
            raise _CupyError("cudaErrorInsufficientDriver")
        return CupyStream(self._driver, self.current.get(device_id, 0))


class _CupyError(RuntimeError):
    pass


NBYTES = 4096


class Gpu:
    """A runtime on a simulated device, and work on its model "a" as a framework enqueues it.

    The clock is virtual: enqueued work is in flight until a caller waits for it.
    """

    def __init__(self, cuda: SimulatedCuda, runtime: Runtime) -> None:
        self.cuda, self.runtime = cuda, runtime
        self.raw = Cuda(cuda.library).start()
        self._host = self.raw.pinned(2 * NBYTES)

    def read(self, stream: int, layer: int = 0) -> None:
        """Enqueue work that reads the layer."""
        address = self.runtime.model("a").layer_bytes(layer).address
        nbytes = min(NBYTES, self.runtime.model("a").layers[layer].nbytes)
        self.raw.dtoh(self._host.address + layer * NBYTES, address, nbytes, stream)

    def faults(self) -> set[str]:
        """Evict the model, and return what the driver found to be wrong with it."""
        self.runtime.evict("a")
        code(self.raw.context_synchronize)  # fails if the context has died
        return {found.kind for found in self.cuda.violations}


@contextmanager
def simulated_gpu(files: dict[str, Path]) -> Iterator[Gpu]:
    """Open a runtime with the models of the fixture `two_files`."""
    with testing.simulated_cuda(memory="64MiB", clock="virtual", d2h=1e9, check=False) as cuda:
        with make(cuda, files, pump=True) as runtime:
            yield Gpu(cuda, runtime)
        gc.collect()
