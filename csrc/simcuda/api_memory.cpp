// Plain device memory and pinned host memory.
#include <sys/mman.h>

#include "simcuda/call.h"
#include "simcuda/capture.h"

namespace warmserve::simcuda {
namespace {

CUresult host_alloc(Call& call, void** out, std::uint64_t bytes, unsigned flags) {
  if (!out || flags > (CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP |
                       CU_MEMHOSTALLOC_WRITECOMBINED))
    return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  *out = nullptr;
  if (bytes == 0) return CUDA_SUCCESS;  // [O L]
  void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  Pinned* pinned = nullptr;
  const CUresult result = call.sim->memory.pin_host(reinterpret_cast<Address>(at), bytes, &pinned);
  if (result != CUDA_SUCCESS) {
    ::munmap(at, bytes);
    return result;
  }
  pinned->allocated = true;
  pinned->flags = flags;
  pinned->context = call.context->handle;
  *out = at;
  return CUDA_SUCCESS;
}

}  // namespace

CUresult cuMemAlloc_v2(CUdeviceptr* out, std::size_t bytes) {
  Call call(Function::cuMemAlloc_v2, Need::work, bytes);
  if (!call) return call.status;
  if (!out || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  Memory& memory = call.sim->memory;
  Physical* physical = nullptr;
  CUresult result = memory.create(bytes, call.context->device, false, &physical);
  if (result != CUDA_SUCCESS) return result;
  memory.pin(physical);
  Reservation* reservation = nullptr;
  result = memory.reserve(bytes, 0, 0, &reservation);
  if (result == CUDA_SUCCESS) {
    reservation->plain = true;
    reservation->context = call.context->handle;
    Mapping* const mapping = memory.map(*reservation, reservation->begin, bytes, physical);
    mapping->access[call.context->device] = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    *out = reservation->begin;
  }
  memory.unpin(physical);
  return result;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
  Call call(Function::cuMemFree_v2, Need::context);
  if (!call) return call.status;
  if (address == 0) return CUDA_SUCCESS;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  Memory& memory = call.sim->memory;
  Reservation* reservation = memory.reservation_at(address);
  if (!reservation || !reservation->plain || reservation->begin != address)
    return CUDA_ERROR_INVALID_VALUE;
  call.sim->detector.take_away(memory.mapping_at(address)->uses, "freed", "cuMemFree", call.number);
  // The real driver waits for the device, although this is not documented.
  const CUresult state = call.sim->drain_context(call.lock, call.context);
  reservation = memory.reservation_at(address);
  if (reservation && reservation->plain && reservation->begin == address)
    memory.free_plain(reservation);
  return state;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, std::size_t* bytes, CUdeviceptr address) {
  Call call(Function::cuMemGetAddressRange_v2, Need::context);
  if (!call) return call.status;
  const Mapping* const mapping = call.sim->memory.mapping_at(address);
  if (!mapping) return CUDA_ERROR_NOT_FOUND;  // [D: listed]
  if (base) *base = mapping->begin;
  if (bytes) *bytes = mapping->bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemAllocHost_v2(void** out, std::size_t bytes) {
  Call call(Function::cuMemAllocHost_v2, Need::work, bytes);
  return call ? host_alloc(call, out, bytes, 0) : call.status;
}

CUresult cuMemHostAlloc(void** out, std::size_t bytes, unsigned flags) {
  Call call(Function::cuMemHostAlloc, Need::work, bytes);
  return call ? host_alloc(call, out, bytes, flags) : call.status;
}

CUresult cuMemFreeHost(void* address) {
  Call call(Function::cuMemFreeHost, Need::context);
  if (!call) return call.status;
  if (!address) return CUDA_SUCCESS;  // [O L]
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  const auto at = reinterpret_cast<Address>(address);
  Memory& memory = call.sim->memory;
  Pinned* pinned = memory.pinned_at(at);
  if (!pinned || !pinned->allocated || pinned->begin != at) return CUDA_ERROR_INVALID_VALUE;
  call.sim->detector.take_away(pinned->uses, "freed", "cuMemFreeHost", call.number);
  const CUresult state = call.sim->drain_context(call.lock, call.context);  // as in cuMemFree
  pinned = memory.pinned_at(at);
  if (pinned && pinned->begin == at) memory.unpin_host(pinned);
  return state;
}

CUresult cuMemHostRegister_v2(void* address, std::size_t bytes, unsigned flags) {
  Call call(Function::cuMemHostRegister_v2, Need::work, bytes);
  if (!call) return call.status;
  const auto at = reinterpret_cast<Address>(address);
  constexpr unsigned known = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP |
                             CU_MEMHOSTREGISTER_IOMEMORY | CU_MEMHOSTREGISTER_READ_ONLY;
  if (!address || bytes == 0 || at + bytes < at || (flags & ~known) != 0)
    return CUDA_ERROR_INVALID_VALUE;
  if (flags & CU_MEMHOSTREGISTER_IOMEMORY) return CUDA_ERROR_NOT_SUPPORTED;
  if ((flags & CU_MEMHOSTREGISTER_READ_ONLY) && !call.sim->options.read_only_register)
    return CUDA_ERROR_NOT_SUPPORTED;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  if (call.sim->memory.place(at, bytes) == Place::device) return CUDA_ERROR_INVALID_VALUE;
  // Claim the range first, so that a second thread that registers the same range gets an error.
  Pinned* pinned = nullptr;
  const CUresult result = call.sim->memory.pin_host(at, bytes, &pinned);
  if (result != CUDA_SUCCESS) return result;
  pinned->flags = flags;
  pinned->context = call.context->handle;
  call.lock.unlock();
  const bool pinnable = Memory::can_pin(at, bytes, !(flags & CU_MEMHOSTREGISTER_READ_ONLY));
  call.lock.lock();
  pinned = call.sim->memory.pinned_at(at);
  // Includes memory that is read-only for the CPU, without READ_ONLY [D; the error code is a
  // guess].
  if (!pinnable) {
    if (pinned) call.sim->memory.unpin_host(pinned);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (pinned) call.sim->memory.keep_pages(pinned);
  return CUDA_SUCCESS;
}

// Legal from any context [O ucx#10643]. Waits for all work, as an H200 does, even if a stream is
// blocked for seconds. This wait is not documented, so the detector requires the program to wait
// first.
CUresult cuMemHostUnregister(void* address) {
  Call call(Function::cuMemHostUnregister, Need::context);
  if (!call) return call.status;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  const auto at = reinterpret_cast<Address>(address);
  Pinned* pinned = call.sim->memory.pinned_at(at);
  if (!address) return CUDA_ERROR_INVALID_VALUE;
  if (!pinned) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  if (pinned->allocated || pinned->begin != at) return CUDA_ERROR_INVALID_VALUE;
  call.sim->detector.take_away(pinned->uses, "unregistered", "cuMemHostUnregister", call.number);
  const CUresult state = call.sim->drain_context(call.lock, call.context);
  pinned = call.sim->memory.pinned_at(at);
  if (pinned && pinned->begin == at) call.sim->memory.unpin_host(pinned);
  return state;
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* address, unsigned flags) {
  Call call(Function::cuMemHostGetDevicePointer_v2, Need::work);
  if (!call) return call.status;
  const auto at = reinterpret_cast<Address>(address);
  if (!out || flags != 0 || !call.sim->memory.pinned_at(at)) return CUDA_ERROR_INVALID_VALUE;
  *out = at;  // host and device share one address space: attribute 91 is 1
  return CUDA_SUCCESS;
}

CUresult cuMemHostGetFlags(unsigned* flags, void* address) {
  Call call(Function::cuMemHostGetFlags, Need::work);
  if (!call) return call.status;
  const Pinned* const pinned = call.sim->memory.pinned_at(reinterpret_cast<Address>(address));
  if (!flags || !pinned || !pinned->allocated) return CUDA_ERROR_INVALID_VALUE;
  *flags = pinned->flags | CU_MEMHOSTALLOC_DEVICEMAP;
  return CUDA_SUCCESS;
}

}  // namespace warmserve::simcuda
