"""The CUDA driver API through ctypes: one method for each call, independent of the native module.

For tests against a simulated device, and for programs that ask a GPU how it behaves. Handles and
addresses are ints. A failed call raises CudaError with the number of its error::

    with testing.simulated_cuda() as simulated:
        cuda = Cuda(simulated.library).start()
        address = cuda.mapped(2 << 20)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._pinned import PAGE, Pinned
from .cuda_types import SIGNATURES, Access, Location, Prop, i32, pointer, size_t, u64

__all__ = [
    "BLOCKING",
    "DEVICE",
    "GLOBAL",
    "HOST_NUMA",
    "LEGACY",
    "NONE",
    "NON_BLOCKING",
    "PAGE",
    "POSIX_FD",
    "READ",
    "READ_WRITE",
    "RELAXED",
    "THREAD_LOCAL",
    "Cuda",
    "CudaError",
    "Pinned",
    "code",
]

NONE, READ, READ_WRITE = 0, 1, 3  # access
DEVICE, HOST_NUMA = 1, 3  # location types
POSIX_FD = 1  # type of handles that other processes can import
BLOCKING, NON_BLOCKING = 0, 1  # stream flags
LEGACY = 1  # handle of the legacy stream
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2  # capture modes


class CudaError(Exception):
    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function}: {code}")
        self.function, self.code = function, code


def code(call: Callable[..., object], *arguments: Any, **options: Any) -> int:
    """Make a call and return 0 or the number of its error."""
    try:
        call(*arguments, **options)
    except CudaError as error:
        return error.code
    return 0


class Cuda:
    def __init__(self, library: Path | str) -> None:
        self._library = ctypes.CDLL(str(library))
        for path in list(Pinned.registered):  # a simulated driver ends when its folder is deleted
            if Path(path).is_absolute() and not Path(path).exists():
                del Pinned.registered[path]
        self._registered = Pinned.registered.setdefault(str(library), {})

    def call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name)
        function.argtypes, function.restype = SIGNATURES[name], i32
        result = function(*arguments)
        if result:
            raise CudaError(name, result)

    def out(self, name: str, *arguments: Any, type: Any = u64) -> int:
        """Make a call that writes its result to its first argument; return the result."""
        result = type()
        self.call(name, ctypes.byref(result), *arguments)
        return int(result.value or 0)

    # Devices and contexts

    def init(self, flags: int = 0) -> None:
        self.call("cuInit", flags)

    def device_count(self) -> int:
        return self.out("cuDeviceGetCount", type=i32)

    def device(self, ordinal: int) -> int:
        return self.out("cuDeviceGet", ordinal, type=i32)

    def attribute(self, attribute: int, device: int = 0) -> int:
        return self.out("cuDeviceGetAttribute", attribute, device, type=i32)

    def retain_primary(self, device: int = 0) -> int:
        return self.out("cuDevicePrimaryCtxRetain", device)

    def release_primary(self, device: int = 0) -> None:
        self.call("cuDevicePrimaryCtxRelease_v2", device)

    def current(self) -> int:
        return self.out("cuCtxGetCurrent")

    def set_current(self, context: int) -> None:
        self.call("cuCtxSetCurrent", context)

    def start(self, device: int = 0) -> Cuda:
        """Initialise CUDA and make the device's primary context current on this thread."""
        self.init()
        self.set_current(self.retain_primary(self.device(device)))
        return self

    def context_synchronize(self) -> None:
        self.call("cuCtxSynchronize")

    # Memory of the device

    def memory(self) -> tuple[int, int]:
        """Return the free and the total bytes."""
        free, total = size_t(), size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def granularity(self, flags: int = 0, prop: Prop | None = None) -> int:
        prop = prop or Prop()
        return self.out("cuMemGetAllocationGranularity", ctypes.byref(prop), flags, type=size_t)

    def reserve(self, nbytes: int, alignment: int = 0, hint: int = 0, flags: int = 0) -> int:
        return self.out("cuMemAddressReserve", nbytes, alignment, hint, flags)

    def address_free(self, address: int, nbytes: int) -> None:
        self.call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int, prop: Prop | None = None, flags: int = 0) -> int:
        return self.out("cuMemCreate", nbytes, ctypes.byref(prop or Prop()), flags)

    def release(self, handle: int) -> None:
        self.call("cuMemRelease", handle)

    def map(self, address: int, nbytes: int, handle: int, offset: int = 0, flags: int = 0) -> None:
        self.call("cuMemMap", address, nbytes, offset, handle, flags)

    def unmap(self, address: int, nbytes: int) -> None:
        self.call("cuMemUnmap", address, nbytes)

    def set_access(
        self, address: int, nbytes: int, access: int = READ_WRITE, device: int = 0
    ) -> None:
        description = Access(Location(1, device), access)
        self.call("cuMemSetAccess", address, nbytes, ctypes.byref(description), 1)

    def share(self, address: int, nbytes: int, cpu: int, device: int = READ_WRITE) -> None:
        """Set the access of both the CPU and the device."""
        wanted = (Access * 2)(
            Access(Location(DEVICE, 0), device), Access(Location(HOST_NUMA, 0), cpu)
        )
        self.call("cuMemSetAccess", address, nbytes, wanted, 2)

    def get_access(self, address: int, device: int = 0, location: int = DEVICE) -> int:
        return self.out("cuMemGetAccess", ctypes.byref(Location(location, device)), address)

    def retain_handle(self, address: int) -> int:
        return self.out("cuMemRetainAllocationHandle", address)

    def export(self, handle: int, kind: int = POSIX_FD, flags: int = 0) -> int:
        """Return a file descriptor by which another process can import an allocation."""
        return self.out("cuMemExportToShareableHandle", handle, kind, flags, type=i32)

    def imported(self, descriptor: int, kind: int = POSIX_FD) -> int:
        """Return a handle of another process's allocation; the descriptor stays open."""
        return self.out("cuMemImportFromShareableHandle", descriptor, kind)

    def pointer_attribute(self, attribute: int, address: int, type: Any = u64) -> int:
        return self.out("cuPointerGetAttribute", attribute, address, type=type)

    def mapped(self, nbytes: int, access: int = READ_WRITE) -> int:
        """Reserve addresses and map one allocation there, which lives until it is unmapped."""
        address, handle = self.reserve(nbytes), self.create(nbytes)
        self.map(address, nbytes, handle)
        self.release(handle)
        if access != NONE:
            self.set_access(address, nbytes, access)
        return address

    # Memory of the host

    def register(self, address: int, nbytes: int, flags: int = 0) -> None:
        self.call("cuMemHostRegister_v2", address, nbytes, flags)
        if owner := Pinned.at(address):
            self._registered[address] = owner

    def unregister(self, address: int) -> None:
        self.call("cuMemHostUnregister", address)
        self._registered.pop(address, None)

    def host_alloc(self, nbytes: int, flags: int = 0) -> int:
        return self.out("cuMemHostAlloc", nbytes, flags)

    def free_host(self, address: int) -> None:
        self.call("cuMemFreeHost", address)

    def pinned(self, nbytes: int, content: bytes = b"") -> Pinned:
        made = Pinned(nbytes)
        made[: len(content)] = content
        self.register(made.address, nbytes)
        return made

    # Work

    def stream(self, flags: int = NON_BLOCKING, priority: int = 0) -> int:
        return self.out("cuStreamCreateWithPriority", flags, priority)

    def priority(self, stream: int) -> int:
        value = i32()
        self.call("cuStreamGetPriority", stream, ctypes.byref(value))
        return value.value

    def stream_context(self, stream: int) -> int:
        context = u64()
        self.call("cuStreamGetCtx", stream, ctypes.byref(context))
        return context.value

    def stream_destroy(self, stream: int) -> None:
        self.call("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: int) -> None:
        self.call("cuStreamSynchronize", stream)

    def sleep(self, stream: int, microseconds: int) -> None:
        """Delay the following work of a stream by this time, however fast the device is."""
        self.call("cuLaunchHostFunc", stream, ctypes.CDLL(None).usleep, pointer(microseconds))

    def wait(self, stream: int, event: int) -> None:
        self.call("cuStreamWaitEvent", stream, event, 0)

    def event(self, flags: int = 2) -> int:
        return self.out("cuEventCreate", flags)

    def event_destroy(self, event: int) -> None:
        self.call("cuEventDestroy_v2", event)

    def record(self, event: int, stream: int) -> None:
        self.call("cuEventRecord", event, stream)

    def event_synchronize(self, event: int) -> None:
        self.call("cuEventSynchronize", event)

    def done(self, event: int) -> bool:
        """Return whether an event is complete."""
        result = code(self.call, "cuEventQuery", event)
        if result not in (0, 600):
            raise CudaError("cuEventQuery", result)
        return result == 0

    def htod(self, to: int, host: int, nbytes: int, stream: int | None = None) -> None:
        """Copy host memory to the device. Without a stream, wait for the copy."""
        if stream is None:
            self.call("cuMemcpyHtoD_v2", to, host, nbytes)
        else:
            self.call("cuMemcpyHtoDAsync_v2", to, host, nbytes, stream)

    def dtoh(self, host: int, address: int, nbytes: int, stream: int | None = None) -> None:
        if stream is None:
            self.call("cuMemcpyDtoH_v2", host, address, nbytes)
        else:
            self.call("cuMemcpyDtoHAsync_v2", host, address, nbytes, stream)

    def dtod(self, to: int, address: int, nbytes: int, stream: int) -> None:
        self.call("cuMemcpyDtoDAsync_v2", to, address, nbytes, stream)

    def memset(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self.call("cuMemsetD8Async", address, value, nbytes, stream)

    def module(self, image: bytes) -> int:
        return self.out("cuModuleLoadData", image)

    def function(self, module: int, name: str) -> int:
        return self.out("cuModuleGetFunction", module, name.encode())

    # Capture

    def begin_capture(self, stream: int, mode: int = GLOBAL) -> None:
        self.call("cuStreamBeginCapture_v2", stream, mode)

    def capture_status(self, stream: int) -> int:
        """Return 0 if the stream is not captured, 1 if it is, and 2 if its capture is invalid."""
        status = i32()
        self.call("cuStreamIsCapturing", stream, ctypes.byref(status))
        return status.value

    def end_capture(self, stream: int) -> int:
        graph = u64()
        self.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        return graph.value

    def instantiate(self, graph: int) -> int:
        """Return an executable graph that can be launched, and destroy the graph."""
        made = self.out("cuGraphInstantiateWithFlags", graph, 0)
        self.call("cuGraphDestroy", graph)
        return made

    def launch_graph(self, graph: int, stream: int) -> None:
        self.call("cuGraphLaunch", graph, stream)

    def exchange_mode(self, mode: int) -> int:
        """Set the capture mode of this thread and return its previous mode."""
        value = i32(mode)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(value))
        return value.value
