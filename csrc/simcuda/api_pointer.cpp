// Queries of the attributes of addresses.
#include <cstring>

#include "simcuda/call.h"

namespace warmserve::simcuda {
namespace {

constexpr int kLastAttribute = 23;  // in CUDA 13.0

template <class T>
void put(void* out, T value) {
  std::memcpy(out, &value, sizeof value);
}

// Writes the attribute of the address to `out`. Returns false, and writes nothing, if the address
// has no such attribute.
bool answer(Simulator& sim, CUpointer_attribute attribute, Address address, void* out) {
  const Reservation* const reservation = sim.memory.reservation_at(address);
  const Mapping* const mapping = sim.memory.mapping_at(address);
  const Pinned* const pinned = sim.memory.pinned_at(address);
  if (!reservation && !pinned) return false;
  switch (static_cast<int>(attribute)) {
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      put(out, reservation ? reservation->begin : pinned->begin);
      return true;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      put(out, static_cast<std::size_t>(reservation ? reservation->bytes : pinned->bytes));
      return true;
    default: break;
  }
  if (reservation && !mapping)
    return false;  // reserved addresses without memory have no attributes
  switch (static_cast<int>(attribute)) {
    case CU_POINTER_ATTRIBUTE_MAPPED: put(out, static_cast<unsigned char>(1)); return true;
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      // [?] null for mapped memory, which belongs to no context.
      put(out, pinned ? pinned->context : reservation->context);
      return true;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      // [?] HOST for mapped memory of the host.
      put(out, static_cast<unsigned>(pinned || mapping->physical->host ? CU_MEMORYTYPE_HOST
                                                                       : CU_MEMORYTYPE_DEVICE));
      return true;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: put(out, address); return true;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (!pinned && mapping->cpu_access == 0) return false;
      put(out, address);
      return true;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: put(out, 0u); return true;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      put(out, static_cast<unsigned long long>(pinned ? pinned->begin : mapping->begin));
      return true;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: put(out, 0u); return true;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      put(out, pinned ? 0 : mapping->physical->device);
      return true;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      put(out, static_cast<unsigned>(reservation && reservation->plain));
      return true;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      put(out,
          static_cast<unsigned long long>(mapping ? mapping->physical->prop.requestedHandleTypes
                                                  : CU_MEM_HANDLE_TYPE_NONE));
      return true;
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
      put(out, static_cast<unsigned>(mapping && sim.options.rdma &&
                                     (reservation->plain ||
                                      mapping->physical->prop.allocFlags.gpuDirectRDMACapable)));
      return true;
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
      put(out, mapping ? unsigned{mapping->access[mapping->physical->device]}
                       : static_cast<unsigned>(CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
      return true;
    default: return false;
  }
}

// Returns the size of the attribute. If an address has no such attribute, this many zeros are
// written.
std::size_t width_of(CUpointer_attribute attribute) {
  switch (static_cast<int>(attribute)) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES: return 8;
    case CU_POINTER_ATTRIBUTE_MAPPED: return 1;
    default: return 4;
  }
}

bool is_known(CUpointer_attribute attribute) {
  const int number = static_cast<int>(attribute);
  return number >= 1 && number <= kLastAttribute;
}

}  // namespace

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr address) {
  Call call(Function::cuPointerGetAttribute, Need::driver);
  if (!call) return call.status;
  if (!data || !is_known(attribute)) return CUDA_ERROR_INVALID_VALUE;
  return answer(*call.sim, attribute, address, data) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// An address that is unknown to the driver is not an error here [D].
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** data,
                                CUdeviceptr address) {
  Call call(Function::cuPointerGetAttributes, Need::driver);
  if (!call) return call.status;
  if (count == 0 || !attributes || !data) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < count; ++i)
    if (!data[i] || !is_known(attributes[i])) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < count; ++i)
    if (!answer(*call.sim, attributes[i], address, data[i]))
      std::memset(data[i], 0, width_of(attributes[i]));
  return CUDA_SUCCESS;
}

CUresult cuPointerSetAttribute(const void* value, CUpointer_attribute attribute,
                               CUdeviceptr address) {
  Call call(Function::cuPointerSetAttribute, Need::driver);
  if (!call) return call.status;
  const Reservation* const reservation = call.sim->memory.reservation_at(address);
  if (!value || attribute != CU_POINTER_ATTRIBUTE_SYNC_MEMOPS || !reservation)
    return CUDA_ERROR_INVALID_VALUE;
  return reservation->plain ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;  // [O ucx#9895]
}

}  // namespace warmserve::simcuda
