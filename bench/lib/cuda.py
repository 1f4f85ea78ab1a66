"""The CUDA driver API as benches call it: the tests' wrapper of the cu* functions, and what they
need beyond: kernels, graphs, and streams that are held up."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from time import perf_counter

from cuda_calls import (
    SIGNATURES,
    Cuda,
    CudaError,
    Pinned,
    code,
    i32,
    pointer,
    size_t,
    u32,
    u64,
)

LIBRARY = "libcuda.so.1"
SIMULATED = "Simulated CUDA"  # the name of such a device
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, pointer)

SIGNATURES |= {  # those that the tests have too may go from there
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
    "cuMemExportToShareableHandle": (pointer, u64, i32, u64),
    "cuMemImportFromShareableHandle": (pointer, u64, i32),
}


class DigestCall(ctypes.Structure):
    """Of csrc/kernels/kernels.h."""

    _fields_ = [("source", u64), ("nbytes", u64), ("granule", u64), ("out", u64)]


class CastCall(ctypes.Structure):
    """Of csrc/kernels/kernels.h; kind 0 is f32 to bf16."""

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
    """What cannot be seen here, with the reason."""


class Gpu(Cuda):
    """A device, with its primary context current on this thread."""

    def __init__(self) -> None:
        super().__init__(LIBRARY)
        self.start()
        self._kept: list[object] = []  # what the driver may still use

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
        """Kept as long as the device, for it is registered as long: memory that goes before leaves
        the driver with pages that nobody has."""
        made = super().pinned(nbytes, content)
        self._kept.append(made)
        return made

    def stream_query(self, stream: int) -> bool:
        """Whether all that it was given is done."""
        result = code(self.call, "cuStreamQuery", stream)
        if result not in (0, 600):
            raise CudaError("cuStreamQuery", result)
        return result == 0

    def host_function(self, stream: int, function: Callable[[], object]) -> None:
        """What it raises is lost."""
        made = _HOST_FUNCTION(lambda _: function() and None)
        self._kept.append(made)
        self.call("cuLaunchHostFunc", stream, ctypes.cast(made, pointer), None)

    def kernel_image(self) -> bytes:
        """This project's kernels as compiled. Raises NotRun where there are none."""
        if self.simulated:
            return b"simulated"
        from warmserve_rt.kernels import fatbin_path

        if not (path := fatbin_path()):
            raise NotRun("the package was built without kernels for the device")
        return path.read_bytes()

    def launch(
        self, function: int, call: ctypes.Structure, stream: int, blocks: int = 1, threads: int = 32
    ) -> None:
        """A kernel whose one parameter is `call`."""
        parameters = (pointer * 1)(ctypes.addressof(call))
        self.call(
            "cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, None
        )

    def instantiate(self, graph: int) -> int:
        return self.out("cuGraphInstantiateWithFlags", graph, 0)

    def graph_launch(self, executable: int, stream: int) -> None:
        self.call("cuGraphLaunch", executable, stream)

    def export(self, handle: int, kind: int = 1) -> int:
        """A file descriptor of a handle."""
        return self.out("cuMemExportToShareableHandle", handle, kind, 0, type=i32)


class Gate:
    """Holds a stream up: what is enqueued behind it waits until it is opened.

    It opens by itself after a while, so that a call which waits for the stream comes back; and
    says so, for that is how such a call is found out.
    """

    def __init__(self, cuda: Gpu, stream: int, seconds: float = 0.5) -> None:
        self._opened = threading.Event()
        self._entered = threading.Event()
        self._seconds = seconds
        self.expired = False  # nobody opened it in time
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
