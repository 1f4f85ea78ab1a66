// Virtual memory management. As on an H200 (driver 580.159), these calls need no current context,
// do not wait for work, and are allowed while a stream is being captured; the error codes are those
// of the H200. Unlike the H200, the simulator refuses calls that the header forbids: to map beyond
// a reservation, and to unmap or set the access of a range with a hole.
#include <fcntl.h>

#include <cstring>
#include <span>

#include "simcuda/call.h"

namespace warmserve::simcuda {
namespace {

constexpr std::uint64_t kHostPage = 4096;

// Returns whether the location is a device of the simulator, for memory or for access.
bool is_device(const Call& call, const CUmemLocation& location) {
  return location.type == CU_MEM_LOCATION_TYPE_DEVICE && location.id >= 0 &&
         location.id < static_cast<int>(call.sim->devices.size());
}
bool is_host(const Call& call, const CUmemLocation& location) {
  return location.type == CU_MEM_LOCATION_TYPE_HOST_NUMA && location.id == 0 &&
         call.sim->options.host_memory();
}

bool is_power_of_two(std::uint64_t value) { return value != 0 && (value & (value - 1)) == 0; }

CUresult check(Call& call, const CUmemAllocationProp& prop) {
  if (prop.type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
  switch (prop.location.type) {
    case CU_MEM_LOCATION_TYPE_DEVICE: break;
    case CU_MEM_LOCATION_TYPE_HOST: return CUDA_ERROR_NOT_SUPPORTED;  // attribute 145 is 0
    case CU_MEM_LOCATION_TYPE_HOST_NUMA:
      if (call.sim->options.host_memory()) break;
      return CUDA_ERROR_NOT_SUPPORTED;  // attribute 141 is 0
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  if (!is_device(call, prop.location) && !is_host(call, prop.location))
    return prop.location.type == CU_MEM_LOCATION_TYPE_DEVICE ? CUDA_ERROR_INVALID_DEVICE
                                                             : CUDA_ERROR_INVALID_VALUE;
  switch (prop.requestedHandleTypes) {
    case CU_MEM_HANDLE_TYPE_NONE: return CUDA_SUCCESS;
    case CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR:
      return call.sim->options.posix_fd ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
    case CU_MEM_HANDLE_TYPE_FABRIC: return CUDA_ERROR_NOT_PERMITTED;  // [O MoonEP#28]
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
}

}  // namespace

CUresult cuMemGetAllocationGranularity(std::size_t* bytes, const CUmemAllocationProp* prop,
                                       CUmemAllocationGranularity_flags option) {
  Call call(Function::cuMemGetAllocationGranularity, Need::driver);
  if (!call) return call.status;
  // An invalid device or type is not detected, as in the real driver [O HT]. The real driver
  // crashes on a null prop.
  if (!bytes || !prop ||
      (option != CU_MEM_ALLOC_GRANULARITY_MINIMUM &&
       option != CU_MEM_ALLOC_GRANULARITY_RECOMMENDED))
    return CUDA_ERROR_INVALID_VALUE;
  *bytes = call.sim->options.granularity;
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* prop,
                                                CUmemGenericAllocationHandle handle) {
  Call call(Function::cuMemGetAllocationPropertiesFromHandle, Need::driver);
  if (!call) return call.status;
  const Physical* const physical = call.sim->memory.find(handle);
  if (!prop || !physical) return CUDA_ERROR_INVALID_VALUE;
  *prop = physical->prop;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* out, std::size_t bytes, std::size_t alignment,
                             CUdeviceptr hint, unsigned long long flags) {
  Call call(Function::cuMemAddressReserve, Need::driver, bytes);
  if (!call) return call.status;
  if (!out || flags != 0 || bytes == 0 || bytes % kHostPage ||
      (alignment != 0 && !is_power_of_two(alignment)))
    return CUDA_ERROR_INVALID_VALUE;
  Reservation* reservation = nullptr;
  const CUresult result = call.sim->memory.reserve(bytes, alignment, hint, &reservation);
  if (result == CUDA_SUCCESS) *out = reservation->begin;
  return result;
}

CUresult cuMemAddressFree(CUdeviceptr address, std::size_t bytes) {
  Call call(Function::cuMemAddressFree, Need::driver, bytes);
  if (!call) return call.status;
  Reservation* const found = call.sim->memory.reservation_at(address);
  if (address == 0 || bytes == 0 || !found || found->plain || found->begin != address ||
      found->bytes != bytes || found->mapped > 0)
    return CUDA_ERROR_INVALID_VALUE;
  call.sim->memory.unreserve(found);
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* out, std::size_t bytes,
                     const CUmemAllocationProp* prop, unsigned long long flags) {
  Call call(Function::cuMemCreate, Need::driver, bytes);
  if (!call) return call.status;
  if (!out || !prop || flags != 0 || bytes == 0 || bytes % call.sim->options.granularity)
    return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult bad = check(call, *prop); bad != CUDA_SUCCESS) return bad;
  Physical* physical = nullptr;
  const bool host = is_host(call, prop->location);
  const CUresult result =
      call.sim->memory.create(bytes, host ? 0 : prop->location.id, host, &physical);
  if (result != CUDA_SUCCESS) return result;
  physical->prop = *prop;
  physical->prop.allocFlags.compressionType = 0;  // a hint, which the simulator ignores
  if (!call.sim->options.rdma) physical->prop.allocFlags.gpuDirectRDMACapable = 0;
  call.sim->memory.give_handle(physical);
  *out = physical->handle;
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  Call call(Function::cuMemRelease, Need::driver);
  if (!call) return call.status;
  Physical* const physical = call.sim->memory.find(handle);
  if (!physical) {
    // Undefined for any invalid handle except 0 [D h:12861].
    if (handle != 0)
      call.sim->detector.violation("misuse", "cuMemRelease of an invalid handle", call.number);
    return CUDA_ERROR_INVALID_VALUE;
  }
  call.sim->memory.drop_reference(physical);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, std::size_t bytes, std::size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  Call call(Function::cuMemMap, Need::driver, bytes);
  if (!call) return call.status;
  Memory& memory = call.sim->memory;
  Physical* const physical = memory.find(handle);
  Reservation* const found = memory.reservation_at(address);
  const std::uint64_t granularity = memory.granularity();
  if (!physical || !found || found->plain || flags != 0 || bytes == 0 || address % granularity ||
      found->begin + found->bytes - address < bytes || !memory.is_free(*found, address, bytes))
    return CUDA_ERROR_INVALID_VALUE;
  if (offset != 0 || bytes != physical->bytes) return CUDA_ERROR_NOT_SUPPORTED;
  memory.map(*found, address, bytes, physical);
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr address, std::size_t bytes) {
  Call call(Function::cuMemUnmap, Need::driver);
  if (!call) return call.status;
  Memory& memory = call.sim->memory;
  call.pay_for_mappings(address, bytes);
  const auto& mappings = memory.whole(address, bytes);
  if (mappings.empty()) return CUDA_ERROR_INVALID_VALUE;
  Reservation& reservation = *memory.reservation_at(address);
  if (reservation.plain) return CUDA_ERROR_INVALID_VALUE;
  for (Mapping* const mapping : mappings) {
    call.sim->detector.take_away(mapping->uses, "unmapped", "cuMemUnmap", call.number);
    memory.unmap(reservation, mapping);
  }
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc* descs,
                        std::size_t count) {
  Call call(Function::cuMemSetAccess, Need::driver);
  if (!call) return call.status;
  call.pay_for_mappings(address, bytes);
  if (!descs || count == 0) return CUDA_ERROR_INVALID_VALUE;
  const std::span all(descs, count);
  for (const CUmemAccessDesc& desc : all) {
    if ((!is_device(call, desc.location) && !is_host(call, desc.location)) ||
        (desc.flags != CU_MEM_ACCESS_FLAGS_PROT_NONE &&
         desc.flags != CU_MEM_ACCESS_FLAGS_PROT_READ &&
         desc.flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE))
      return CUDA_ERROR_INVALID_VALUE;
  }
  const auto& mappings = call.sim->memory.whole(address, bytes);
  if (mappings.empty() || call.sim->memory.reservation_at(address)->plain)
    return CUDA_ERROR_INVALID_VALUE;
  for (const Mapping* const mapping : mappings) {
    if (mapping->physical->host) continue;
    for (const CUmemAccessDesc& desc : all)  // the CPU is not a peer [D]
      if (is_host(call, desc.location) ||
          (desc.location.id != mapping->physical->device && !call.sim->options.peers))
        return CUDA_ERROR_INVALID_VALUE;
  }
  for (Mapping* const mapping : mappings) {
    call.sim->detector.take_away(mapping->uses, "access changed", "cuMemSetAccess", call.number);
    for (const CUmemAccessDesc& desc : all) {
      if (!is_host(call, desc.location)) {
        mapping->access[desc.location.id] = static_cast<std::uint8_t>(desc.flags);
      } else if (!call.sim->memory.set_cpu_access(mapping, desc.flags)) {
        return CUDA_ERROR_OUT_OF_MEMORY;
      }
    }
  }
  return CUDA_SUCCESS;
}

CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location,
                        CUdeviceptr address) {
  Call call(Function::cuMemGetAccess, Need::driver);
  if (!call) return call.status;
  const Mapping* const mapping = call.sim->memory.mapping_at(address);
  if (!flags || !location || !mapping || (!is_device(call, *location) && !is_host(call, *location)))
    return CUDA_ERROR_INVALID_VALUE;
  *flags = is_host(call, *location) ? mapping->cpu_access : mapping->access[location->id];
  return CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* out, void* address) {
  Call call(Function::cuMemRetainAllocationHandle, Need::driver);
  if (!call) return call.status;
  const auto at = reinterpret_cast<Address>(address);
  Mapping* const mapping = call.sim->memory.mapping_at(at);
  if (!out || !mapping || call.sim->memory.reservation_at(at)->plain)
    return CUDA_ERROR_INVALID_VALUE;
  call.sim->memory.give_handle(mapping->physical);
  *out = mapping->physical->handle;
  return CUDA_SUCCESS;
}

// A descriptor keeps the contents alive, also without a handle; whether it keeps memory of a GPU
// alive is not known [?].
CUresult cuMemExportToShareableHandle(void* out, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  Call call(Function::cuMemExportToShareableHandle, Need::driver);
  if (!call) return call.status;
  const Physical* const physical = call.sim->memory.find(handle);
  if (!out || !physical || flags != 0 || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR ||
      physical->prop.requestedHandleTypes != type)
    return CUDA_ERROR_INVALID_VALUE;
  // Running operations may access the memory, whose place changes. The wait releases the lock.
  call.sim->settle(call.lock);
  Physical* const still = call.sim->memory.find(handle);
  if (!still) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult bad = call.sim->memory.share(still); bad != CUDA_SUCCESS) return bad;
  const int fd = ::fcntl(still->file->descriptor(), F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  std::memcpy(out, &fd, sizeof fd);
  return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* out, void* os_handle,
                                        CUmemAllocationHandleType type) {
  Call call(Function::cuMemImportFromShareableHandle, Need::driver);
  if (!call) return call.status;
  if (!out || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
  const int fd = static_cast<int>(reinterpret_cast<std::intptr_t>(os_handle));
  Physical* physical = nullptr;
  if (const CUresult bad = call.sim->memory.import(fd, &physical); bad != CUDA_SUCCESS) return bad;
  call.sim->memory.give_handle(physical);
  *out = physical->handle;
  return CUDA_SUCCESS;
}

}  // namespace warmserve::simcuda
