// Initialisation, versions, errors, and the devices with their attributes.
#include <cstdio>
#include <cstring>

#include "simcuda/call.h"

namespace warmserve::simcuda {
namespace {

constexpr int kLastAttribute = 147;  // in CUDA 13.0

int attribute_of(const Options& options, int device, int attribute) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
    case 2:
    case 3: return 1024;        // MAX_BLOCK_DIM_X, _Y
    case 4: return 64;          // MAX_BLOCK_DIM_Z
    case 5: return 0x7fffffff;  // MAX_GRID_DIM_X
    case 6:
    case 7: return 65535;      // MAX_GRID_DIM_Y, _Z
    case 8: return 48 * 1024;  // MAX_SHARED_MEMORY_PER_BLOCK
    case 9: return 64 * 1024;  // TOTAL_CONSTANT_MEMORY
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case 11: return 0x7fffffff;  // MAX_PITCH
    case 12: return 65536;       // MAX_REGISTERS_PER_BLOCK
    case 13:
    case 36: return 1'000'000;  // CLOCK_RATE, MEMORY_CLOCK_RATE
    case 14: return 512;        // TEXTURE_ALIGNMENT
    case 15: return 1;          // GPU_OVERLAP
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 16;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: return options.integrated;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: return 1;
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: return 1;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: return device + 1;
    case 37: return 512;              // GLOBAL_MEMORY_BUS_WIDTH
    case 38: return 4 * 1024 * 1024;  // L2_CACHE_SIZE
    case 39: return 2048;             // MAX_THREADS_PER_MULTIPROCESSOR
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 2;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return options.capability / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return options.capability % 10;
    case 78: return 1;           // STREAM_PRIORITIES_SUPPORTED
    case 81: return 228 * 1024;  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 82: return 65536;       // MAX_REGISTERS_PER_MULTIPROCESSOR
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: return 1;
    case 97: return 227 * 1024;  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED: return 1;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return 1;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: return options.posix_fd;
    case 106: return 32;  // MAX_BLOCKS_PER_MULTIPROCESSOR
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED: return options.rdma;
    case CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID: return options.numa_node;
    case CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
      return options.host_memory();
    case CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED: return options.read_only_register;
    default: return 0;
  }
}

CUresult uuid(Function function, CUuuid* out, CUdevice device) {
  Call call(function, Need::driver);
  if (!call) return call.status;
  if (!out) return call.fail(CUDA_ERROR_INVALID_VALUE);
  if (!call.device(device)) return call.status;
  std::memcpy(out->bytes, "warmserve sim  ", 16);
  out->bytes[15] = static_cast<char>(device);
  return CUDA_SUCCESS;
}

struct ErrorName {
  int value;
  const char* name;
};
constexpr ErrorName kErrors[] = {
#define X(name, value) {value, "CUDA_" #name},
    WARMSERVE_CUDA_ERRORS(X)
#undef X
};

// For cuGetErrorName and cuGetErrorString, which need neither cuInit nor the lock.
CUresult error_text(CUresult error, const char** out) {
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  for (const auto& [value, name] : kErrors) {
    if (value != error) continue;
    *out = name;
    return CUDA_SUCCESS;
  }
  *out = nullptr;
  return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

CUresult cuInit(unsigned flags) {
  Call call(Function::cuInit, Need::nothing);
  if (!call) return call.status;
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (call.sim->devices.empty()) return CUDA_ERROR_NO_DEVICE;
  call.sim->initialised = true;
  call.lock.unlock();
  watch_process_end();
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  Call call(Function::cuDriverGetVersion, Need::nothing);
  if (!call) return call.status;
  if (!version) return CUDA_ERROR_INVALID_VALUE;
  *version = call.sim->options.driver_version;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) { return error_text(error, name); }
CUresult cuGetErrorString(CUresult error, const char** text) { return error_text(error, text); }

CUresult cuDeviceGetCount(int* count) {
  Call call(Function::cuDeviceGetCount, Need::driver);
  if (!call) return call.status;
  if (!count) return CUDA_ERROR_INVALID_VALUE;
  *count = static_cast<int>(call.sim->devices.size());
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  Call call(Function::cuDeviceGet, Need::driver);
  if (!call) return call.status;
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  if (call.device(ordinal)) *device = ordinal;
  return call.status;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  Call call(Function::cuDeviceGetName, Need::driver);
  if (!call) return call.status;
  if (!name || length <= 0) return CUDA_ERROR_INVALID_VALUE;
  if (!call.device(device)) return call.status;
  std::snprintf(name, static_cast<std::size_t>(length), "%s", call.sim->options.name.c_str());
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* out, CUdevice device) {
  return uuid(Function::cuDeviceGetUuid, out, device);
}
CUresult cuDeviceGetUuid_v2(CUuuid* out, CUdevice device) {
  return uuid(Function::cuDeviceGetUuid_v2, out, device);
}

CUresult cuDeviceTotalMem_v2(std::size_t* bytes, CUdevice device) {
  Call call(Function::cuDeviceTotalMem_v2, Need::driver);
  if (!call) return call.status;
  if (!bytes) return CUDA_ERROR_INVALID_VALUE;
  if (call.device(device)) *bytes = call.sim->options.memory;
  return call.status;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  Call call(Function::cuDeviceGetAttribute, Need::driver);
  if (!call) return call.status;
  const int number = static_cast<int>(attribute);
  if (!value || number < 1 || number > kLastAttribute) return CUDA_ERROR_INVALID_VALUE;
  if (call.device(device)) *value = attribute_of(call.sim->options, device, number);
  return call.status;
}

CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
  Call call(Function::cuDeviceGetPCIBusId, Need::driver);
  if (!call) return call.status;
  if (!id || length < 13) return CUDA_ERROR_INVALID_VALUE;
  if (!call.device(device)) return call.status;
  std::snprintf(id, static_cast<std::size_t>(length), "0000:%02x:00.0", device + 1);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetByPCIBusId(CUdevice* device, const char* id) {
  Call call(Function::cuDeviceGetByPCIBusId, Need::driver);
  if (!call) return call.status;
  unsigned bus = 0;
  if (!device || !id || std::sscanf(id, "0000:%x:00", &bus) != 1) return CUDA_ERROR_INVALID_VALUE;
  if (call.device(static_cast<int>(bus) - 1)) *device = static_cast<int>(bus) - 1;
  return call.status;
}

CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  Call call(Function::cuDeviceCanAccessPeer, Need::driver);
  if (!call) return call.status;
  if (!can) return CUDA_ERROR_INVALID_VALUE;
  if (call.device(device) && call.device(peer)) *can = call.sim->options.peers && device != peer;
  return call.status;
}

CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
  Call call(Function::cuDeviceComputeCapability, Need::driver);
  if (!call) return call.status;
  if (!major || !minor) return CUDA_ERROR_INVALID_VALUE;
  if (!call.device(device)) return call.status;
  *major = call.sim->options.capability / 10;
  *minor = call.sim->options.capability % 10;
  return CUDA_SUCCESS;
}

}  // namespace warmserve::simcuda
