"""The C types, structures and signatures of CUDA's driver API that :mod:`.cuda_api` calls."""

from __future__ import annotations

import ctypes
from typing import Any

u32, u64, size_t, i32 = ctypes.c_uint, ctypes.c_ulonglong, ctypes.c_size_t, ctypes.c_int
pointer = ctypes.c_void_p


class Location(ctypes.Structure):
    _fields_ = [("type", i32), ("id", i32)]


class Prop(ctypes.Structure):
    """CUmemAllocationProp; the default describes memory of device 0."""

    _fields_ = [
        ("type", i32),
        ("handle_types", i32),
        ("location", Location),
        ("win32", pointer),
        ("flags", ctypes.c_ubyte * 8),
    ]

    def __init__(self, *, type: int = 1, location: int = 1, id: int = 0) -> None:
        super().__init__(type, 0, Location(location, id))


class Access(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", i32)]


# The argument types of each call.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (u32,),
    "cuDriverGetVersion": (pointer,),
    "cuDeviceGetCount": (pointer,),
    "cuDeviceGet": (pointer, i32),
    "cuDeviceGetAttribute": (pointer, i32, i32),
    "cuDevicePrimaryCtxRetain": (pointer, i32),
    "cuDevicePrimaryCtxRelease_v2": (i32,),
    "cuCtxGetCurrent": (pointer,),
    "cuCtxSetCurrent": (u64,),
    "cuCtxSynchronize": (),
    "cuCtxSynchronize_v2": (u64,),
    "cuMemGetInfo_v2": (pointer, pointer),
    "cuMemGetAllocationGranularity": (pointer, pointer, u32),
    "cuMemAddressReserve": (pointer, size_t, size_t, u64, u64),
    "cuMemAddressFree": (u64, size_t),
    "cuMemCreate": (pointer, size_t, pointer, u64),
    "cuMemRelease": (u64,),
    "cuMemMap": (u64, size_t, size_t, u64, u64),
    "cuMemUnmap": (u64, size_t),
    "cuMemSetAccess": (u64, size_t, pointer, size_t),
    "cuMemGetAccess": (pointer, pointer, u64),
    "cuMemRetainAllocationHandle": (pointer, pointer),
    "cuMemExportToShareableHandle": (pointer, u64, i32, u64),
    "cuMemImportFromShareableHandle": (pointer, u64, i32),
    "cuPointerGetAttribute": (pointer, i32, u64),
    "cuPointerGetAttributes": (u32, pointer, pointer, u64),
    "cuPointerSetAttribute": (pointer, i32, u64),
    "cuMemGetAddressRange_v2": (pointer, pointer, u64),
    "cuMemHostRegister_v2": (pointer, size_t, u32),
    "cuMemHostUnregister": (pointer,),
    "cuMemHostAlloc": (pointer, size_t, u32),
    "cuMemFreeHost": (pointer,),
    "cuMemAlloc_v2": (pointer, size_t),
    "cuMemcpyHtoD_v2": (u64, pointer, size_t),
    "cuMemcpyDtoH_v2": (pointer, u64, size_t),
    "cuMemcpyHtoDAsync_v2": (u64, pointer, size_t, u64),
    "cuMemcpyDtoHAsync_v2": (pointer, u64, size_t, u64),
    "cuMemcpyDtoDAsync_v2": (u64, u64, size_t, u64),
    "cuMemsetD8Async": (u64, ctypes.c_ubyte, size_t, u64),
    "cuStreamCreateWithPriority": (pointer, u32, i32),
    "cuStreamDestroy_v2": (u64,),
    "cuStreamQuery": (u64,),
    "cuStreamGetPriority": (u64, pointer),
    "cuStreamGetCtx": (u64, pointer),
    "cuStreamIsCapturing": (u64, pointer),
    "cuStreamSynchronize": (u64,),
    "cuStreamWaitEvent": (u64, u64, u32),
    "cuStreamBeginCapture_v2": (u64, i32),
    "cuStreamEndCapture": (u64, pointer),
    "cuThreadExchangeStreamCaptureMode": (pointer,),
    "cuGraphDestroy": (u64,),
    "cuGraphInstantiateWithFlags": (pointer, u64, u64),
    "cuGraphLaunch": (u64, u64),
    "cuGraphExecDestroy": (u64,),
    "cuEventCreate": (pointer, u32),
    "cuEventDestroy_v2": (u64,),
    "cuEventRecord": (u64, u64),
    "cuEventQuery": (u64,),
    "cuEventSynchronize": (u64,),
    "cuLaunchHostFunc": (u64, pointer, pointer),
    "cuModuleLoadData": (pointer, pointer),
    "cuModuleGetFunction": (pointer, u64, ctypes.c_char_p),
}
