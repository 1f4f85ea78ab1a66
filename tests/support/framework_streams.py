"""Stand-ins for torch.cuda and cupy.cuda whose streams are those of a simulated CUDA device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

from warmserve_rt.testing.cuda_api import Cuda


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
