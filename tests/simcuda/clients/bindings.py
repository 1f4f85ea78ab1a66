"""Check NVIDIA's Python bindings: map granules in a reservation, and copy data there and back."""

import ctypes
import mmap
from typing import Any

from cuda.bindings import driver

GRANULES = 3


def call(function: Any, *arguments: Any) -> Any:
    error, *results = function(*arguments)
    assert error == driver.CUresult.CUDA_SUCCESS, (function.__name__, error)
    return results[0] if len(results) == 1 else results


call(driver.cuInit, 0)
device = call(driver.cuDeviceGet, 0)
call(driver.cuCtxSetCurrent, call(driver.cuDevicePrimaryCtxRetain, device))

prop = driver.CUmemAllocationProp()
prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
prop.location.id = int(device)
minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
granule = call(driver.cuMemGetAllocationGranularity, prop, minimum)
size = GRANULES * granule

reserved = call(driver.cuMemAddressReserve, size, granule, 0, 0)
handles = [call(driver.cuMemCreate, granule, prop, 0) for _ in range(GRANULES)]
for i, handle in enumerate(handles):
    call(driver.cuMemMap, int(reserved) + i * granule, granule, 0, handle, 0)
access = driver.CUmemAccessDesc()
access.location = prop.location
access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
call(driver.cuMemSetAccess, reserved, size, [access], 1)

host = mmap.mmap(-1, 2 * size)
address = ctypes.addressof(ctypes.c_char.from_buffer(host))
call(driver.cuMemHostRegister, address, 2 * size, 0)
host[:size] = bytes(range(256)) * (size // 256)
stream = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
event = call(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
call(driver.cuMemcpyHtoDAsync, reserved, address, size, stream)
call(driver.cuMemcpyDtoHAsync, address + size, reserved, size, stream)
call(driver.cuEventRecord, event, stream)
call(driver.cuEventSynchronize, event)
assert host[size:] == host[:size]

(refused,) = driver.cuMemUnmap(reserved, granule - 1)
assert refused == driver.CUresult.CUDA_ERROR_INVALID_VALUE, refused
call(driver.cuMemUnmap, reserved, size)
for handle in handles:
    call(driver.cuMemRelease, handle)
call(driver.cuMemAddressFree, reserved, size)
call(driver.cuMemHostUnregister, address)
call(driver.cuEventDestroy, event)
call(driver.cuStreamDestroy, stream)
call(driver.cuDevicePrimaryCtxRelease, device)
print("fine")
