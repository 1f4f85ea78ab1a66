"""The CUDA driver API for benches: the tests' wrapper of the cu* functions, extended by kernels,
graphs and streams that can be blocked."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from time import perf_counter

from warmserve_rt.testing.cuda_api import Cuda, CudaError, Pinned, code
from warmserve_rt.testing.cuda_types import SIGNATURES, i32, pointer, size_t, u32, u64

LIBRARY = "libcuda.so.1"
SIMULATED = "Simulated CUDA"  # the name of a simulated device
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, pointer)

SIGNATURES |= {
    "cuDriverGetVersion": (pointer,),
    "cuMemAlloc_v2": (pointer, size_t),
    "cuMemGetAddressRange_v2": (pointer, pointer, u64),
    "cuMemHostGetDevicePointer_v2": (pointer, pointer, u32),
    "cuPointerGetAttributes": (u32, pointer, pointer, u64),
    "cuStreamQuery": (u64,),
    "cuDeviceGetName": (pointer, i32, i32),
    "cuEventQuery": (u64,),
    "cuGraphExecDestroy": (u64,),
    "cuGraphInstantiateWithFlags": (pointer, u64, u64),
    "cuGraphLaunch": (u64, u64),
    "cuLaunchKernel": (u64, *[u32] * 7, u64, pointer, pointer),
}


class DigestCall(ctypes.Structure):
    """The structure of the same name in csrc/kernels/kernels.h."""

    _fields_ = [("source", u64), ("nbytes", u64), ("granule", u64), ("out", u64)]


class CastCall(ctypes.Structure):
    """The structure of the same name in csrc/kernels/kernels.h; kind 0 is f32 to bf16."""

    _fields_ = [
        ("kind", u32),
        ("source", u64),
        ("to", u64),
        ("count", u64),
        ("scales", u64),
        ("columns", u64),
        ("block_rows", u64),
        ("block_columns", u64),
    ]


class NotRun(Exception):
    """A check cannot run here; the message gives the reason."""


class Gpu(Cuda):
    """A device, with its primary context current on this thread."""

    def __init__(self) -> None:
        super().__init__(LIBRARY)
        self.start()
        self._kept: list[object] = []  # objects that the driver may still use

    @property
    def name(self) -> str:
        text = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", text, len(text) - 1, 0)
        return text.value.decode()

    @property
    def version(self) -> int:
        return self.out("cuDriverGetVersion", type=i32)

    @property
    def simulated(self) -> bool:
        return self.name == SIMULATED

    def pinned(self, nbytes: int, content: bytes = b"") -> Pinned:
        """Return pinned memory that lives as long as the device.

        It stays registered that long: if it were freed earlier, the driver would still refer to
        the freed pages.
        """
        made = super().pinned(nbytes, content)
        self._kept.append(made)
        return made

    def stream_query(self, stream: int) -> bool:
        """Return whether the stream has finished all its work."""
        result = code(self.call, "cuStreamQuery", stream)
        if result not in (0, 600):
            raise CudaError("cuStreamQuery", result)
        return result == 0

    def host_function(self, stream: int, function: Callable[[], object]) -> None:
        """Enqueue a host function. Its exceptions are lost."""
        made = _HOST_FUNCTION(lambda _: function() and None)
        self._kept.append(made)
        self.call("cuLaunchHostFunc", stream, ctypes.cast(made, pointer), None)

    def kernel_image(self) -> bytes:
        """Return this project's compiled kernels. Raises NotRun if the build has none."""
        if self.simulated:
            return b"simulated"
        from warmserve_rt.kernels import fatbin_path

        if not (path := fatbin_path()):
            raise NotRun("the package was built without kernels for the device")
        return path.read_bytes()

    def launch(
        self, function: int, call: ctypes.Structure, stream: int, blocks: int = 1, threads: int = 32
    ) -> None:
        """Launch a kernel with the single parameter `call`."""
        parameters = (pointer * 1)(ctypes.addressof(call))
        self.call(
            "cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, None
        )

    def instantiate(self, graph: int) -> int:
        return self.out("cuGraphInstantiateWithFlags", graph, 0)

    def graph_launch(self, executable: int, stream: int) -> None:
        self.call("cuGraphLaunch", executable, stream)


class Gate:
    """Blocks a stream: work enqueued behind the gate waits until the gate is opened.

    The gate opens by itself after `seconds`, so that a call that waits for the stream returns.
    `expired` then tells that such a call has waited.
    """

    def __init__(self, cuda: Gpu, stream: int, seconds: float = 0.5) -> None:
        self._opened = threading.Event()
        self._entered = threading.Event()
        self._seconds = seconds
        self.expired = False  # it opened by itself
        cuda.host_function(stream, self._hold)
        if not self._entered.wait(10):
            raise NotRun("a host function did not begin within 10 s")

    def _hold(self) -> None:
        self._entered.set()
        self.expired = not self._opened.wait(self._seconds)

    def open(self) -> None:
        self._opened.set()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        self.open()


def microseconds(call: Callable[..., object], *arguments: object) -> float:
    begin = perf_counter()
    call(*arguments)
    return (perf_counter() - begin) * 1e6


__all__ = [
    "SIMULATED",
    "CastCall",
    "CudaError",
    "DigestCall",
    "Gate",
    "Gpu",
    "NotRun",
    "Pinned",
    "code",
    "microseconds",
    "size_t",
]
