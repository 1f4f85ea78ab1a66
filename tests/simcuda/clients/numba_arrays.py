"""Check Numba's CUDA target: find the device, and copy an array there and back."""

import numpy as np
from numba import cuda

assert len(cuda.gpus) == 1  # cuda.is_available() would also need a compiler
device = cuda.get_current_device()
assert device.compute_capability == (9, 0), device.compute_capability
assert b"Simulated" in device.name if isinstance(device.name, bytes) else "Simulated" in device.name
free, total = cuda.current_context().get_memory_info()
assert 0 < free <= total == 1 << 30, (free, total)

there = np.arange(1 << 20, dtype=np.float32).reshape(1 << 10, 1 << 10)
on_device = cuda.to_device(there)
assert on_device.__cuda_array_interface__["shape"] == there.shape
assert (on_device.copy_to_host() == there).all()

stream = cuda.stream()
with cuda.pinned(there):
    on_device = cuda.to_device(there, stream=stream)
    back = cuda.pinned_array_like(there)
    on_device.copy_to_host(back, stream=stream)
    stream.synchronize()
assert (back == there).all()
print("fine")
