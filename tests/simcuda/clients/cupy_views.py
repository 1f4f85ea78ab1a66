"""Check CuPy arrays over addresses that CuPy does not own.

CuPy copies with libcudart, which does not run on a simulated driver, so nothing is copied here.
"""

import sys

import cupy
from cuda.bindings import driver


def call(result: tuple[object, ...]) -> object:
    assert result[0] == driver.CUresult.CUDA_SUCCESS, result
    return result[-1]


call(driver.cuInit(0))
call(driver.cuCtxSetCurrent(call(driver.cuDevicePrimaryCtxRetain(0))))
address = int(call(driver.cuMemAlloc(1 << 20)))

memory = cupy.cuda.UnownedMemory(address, 1 << 20, owner=sys, device_id=0)
array = cupy.ndarray((128, 64), cupy.float32, cupy.cuda.MemoryPointer(memory, 4096))
assert array.data.ptr == address + 4096
assert (array.shape, array.dtype, array.nbytes) == ((128, 64), cupy.float32, 128 * 64 * 4)
part = array[3:, 5]
assert part.data.ptr == address + 4096 + (3 * 64 + 5) * 4
assert part.strides == (64 * 4,)
assert array.view(cupy.uint8).shape == (128, 256)
print("fine")
