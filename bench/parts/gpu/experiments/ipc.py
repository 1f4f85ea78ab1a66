"""Granules and events that other processes may use."""

from __future__ import annotations

import ctypes
import os

from lib.cuda import Gpu, NotRun
from warmserve_rt.testing.cuda_types import SIGNATURES, Prop, pointer, u64

POSIX_FD = 1  # type of a handle
EVENT = 6  # flags: no timing, for other processes


class IpcEvent(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 64)]


SIGNATURES |= {
    "cuIpcGetEventHandle": (pointer, u64),
    "cuIpcOpenEventHandle": (pointer, IpcEvent),
}


def create(cuda: Gpu, nbytes: int) -> int:
    """Return a granule that can be exported."""
    if not cuda.attribute(103):
        raise NotRun("the device has no handles as file descriptors (attribute 103)")
    prop = Prop()
    prop.handle_types = POSIX_FD
    return cuda.create(nbytes, prop)


def imported(cuda: Gpu, descriptor: int) -> int:
    """Return the granule of a descriptor, and close the descriptor."""
    try:
        return cuda.out("cuMemImportFromShareableHandle", descriptor, POSIX_FD)
    finally:
        os.close(descriptor)


def mapped(cuda: Gpu, handle: int, nbytes: int, access: int = 3) -> int:
    address = cuda.reserve(nbytes)
    cuda.map(address, nbytes, handle)
    cuda.set_access(address, nbytes, access)
    return address


def export_event(cuda: Gpu, event: int) -> str:
    made = IpcEvent()
    cuda.call("cuIpcGetEventHandle", ctypes.byref(made), event)
    return bytes(made).hex()


def open_event(cuda: Gpu, text: str) -> int:
    return cuda.out("cuIpcOpenEventHandle", IpcEvent.from_buffer_copy(bytes.fromhex(text)))
