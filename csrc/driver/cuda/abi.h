// The part of the CUDA driver API that this project uses or simulates, written by hand: types,
// values and signatures as drivers from 12.0 on export them. Building therefore needs no toolkit.
// Each name below is the exported symbol itself and ignores the renames of later headers (cuda.h 13
// turns cuCtxCreate into a version that 12.x drivers do not have). A test compares this file with
// cuda.h if a toolkit is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace warmserve::cuda {

using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUmemGenericAllocationHandle = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;
using CUgraphNode = struct CUgraphNode_st*;
using CUhostFn = void (*)(void* user_data);
using CUstreamCallback = void (*)(CUstream stream, int status, void* user_data);
struct CUuuid {
  char bytes[16];
};

// clang-format off
#define WARMSERVE_CUDA_ERRORS(X) \
  X(SUCCESS, 0) X(ERROR_INVALID_VALUE, 1) X(ERROR_OUT_OF_MEMORY, 2) X(ERROR_NOT_INITIALIZED, 3) \
  X(ERROR_DEINITIALIZED, 4) X(ERROR_STUB_LIBRARY, 34) X(ERROR_DEVICE_UNAVAILABLE, 46) \
  X(ERROR_NO_DEVICE, 100) X(ERROR_INVALID_DEVICE, 101) X(ERROR_INVALID_IMAGE, 200) \
  X(ERROR_INVALID_CONTEXT, 201) X(ERROR_MAP_FAILED, 205) X(ERROR_UNMAP_FAILED, 206) \
  X(ERROR_ALREADY_MAPPED, 208) X(ERROR_NO_BINARY_FOR_GPU, 209) X(ERROR_NOT_MAPPED, 211) \
  X(ERROR_ECC_UNCORRECTABLE, 214) X(ERROR_CONTEXT_ALREADY_IN_USE, 216) X(ERROR_INVALID_PTX, 218) \
  X(ERROR_NVLINK_UNCORRECTABLE, 220) X(ERROR_UNSUPPORTED_PTX_VERSION, 222) X(ERROR_CONTAINED, 226) \
  X(ERROR_OPERATING_SYSTEM, 304) X(ERROR_INVALID_HANDLE, 400) X(ERROR_ILLEGAL_STATE, 401) \
  X(ERROR_NOT_FOUND, 500) X(ERROR_NOT_READY, 600) X(ERROR_ILLEGAL_ADDRESS, 700) \
  X(ERROR_LAUNCH_OUT_OF_RESOURCES, 701) X(ERROR_LAUNCH_TIMEOUT, 702) \
  X(ERROR_PRIMARY_CONTEXT_ACTIVE, 708) X(ERROR_CONTEXT_IS_DESTROYED, 709) X(ERROR_ASSERT, 710) \
  X(ERROR_HOST_MEMORY_ALREADY_REGISTERED, 712) X(ERROR_HOST_MEMORY_NOT_REGISTERED, 713) \
  X(ERROR_HARDWARE_STACK_ERROR, 714) X(ERROR_ILLEGAL_INSTRUCTION, 715) \
  X(ERROR_MISALIGNED_ADDRESS, 716) X(ERROR_INVALID_ADDRESS_SPACE, 717) X(ERROR_INVALID_PC, 718) \
  X(ERROR_LAUNCH_FAILED, 719) X(ERROR_TENSOR_MEMORY_LEAK, 721) X(ERROR_NOT_PERMITTED, 800) \
  X(ERROR_NOT_SUPPORTED, 801) X(ERROR_SYSTEM_NOT_READY, 802) X(ERROR_SYSTEM_DRIVER_MISMATCH, 803) \
  X(ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, 804) X(ERROR_STREAM_CAPTURE_UNSUPPORTED, 900) \
  X(ERROR_STREAM_CAPTURE_INVALIDATED, 901) X(ERROR_STREAM_CAPTURE_MERGE, 902) \
  X(ERROR_STREAM_CAPTURE_UNMATCHED, 903) X(ERROR_STREAM_CAPTURE_UNJOINED, 904) \
  X(ERROR_STREAM_CAPTURE_ISOLATION, 905) X(ERROR_STREAM_CAPTURE_IMPLICIT, 906) \
  X(ERROR_CAPTURED_EVENT, 907) X(ERROR_STREAM_CAPTURE_WRONG_THREAD, 908) \
  X(ERROR_EXTERNAL_DEVICE, 911) X(ERROR_UNKNOWN, 999)
// clang-format on
enum CUresult : int {
#define X(name, value) CUDA_##name = value,
  WARMSERVE_CUDA_ERRORS(X)
#undef X
};

enum CUdevice_attribute : int {
  CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 1,
  CU_DEVICE_ATTRIBUTE_WARP_SIZE = 10,
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_INTEGRATED = 18,
  CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY = 19,
  CU_DEVICE_ATTRIBUTE_COMPUTE_MODE = 20,
  CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS = 31,
  CU_DEVICE_ATTRIBUTE_PCI_BUS_ID = 33,
  CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID = 34,
  CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT = 40,
  CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41,
  CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID = 50,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY = 83,
  CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS = 88,
  CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91,
  CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED = 99,
  CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
  CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103,
  CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED = 110,
  CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED = 113,
  CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID = 134,
  CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 141,
};

enum CUmemAllocationType : int {
  CU_MEM_ALLOCATION_TYPE_INVALID = 0,
  CU_MEM_ALLOCATION_TYPE_PINNED = 1,
};
enum CUmemAllocationHandleType : int {
  CU_MEM_HANDLE_TYPE_NONE = 0,
  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1,
  CU_MEM_HANDLE_TYPE_FABRIC = 8,
};
enum CUmemLocationType : int {
  CU_MEM_LOCATION_TYPE_INVALID = 0,
  CU_MEM_LOCATION_TYPE_DEVICE = 1,
  CU_MEM_LOCATION_TYPE_HOST = 2,
  CU_MEM_LOCATION_TYPE_HOST_NUMA = 3,
  CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT = 4,
};
enum CUmemAccess_flags : int {
  CU_MEM_ACCESS_FLAGS_PROT_NONE = 0,
  CU_MEM_ACCESS_FLAGS_PROT_READ = 1,
  CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3,
};
enum CUmemAllocationGranularity_flags : int {
  CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0,
  CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 1,
};
struct CUmemLocation {
  CUmemLocationType type;
  int id;
};
struct CUmemAllocationProp {
  CUmemAllocationType type;
  CUmemAllocationHandleType requestedHandleTypes;
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};
struct CUmemAccessDesc {
  CUmemLocation location;
  CUmemAccess_flags flags;
};

enum CUpointer_attribute : int {
  CU_POINTER_ATTRIBUTE_CONTEXT = 1,
  CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2,
  CU_POINTER_ATTRIBUTE_DEVICE_POINTER = 3,
  CU_POINTER_ATTRIBUTE_HOST_POINTER = 4,
  CU_POINTER_ATTRIBUTE_SYNC_MEMOPS = 6,
  CU_POINTER_ATTRIBUTE_BUFFER_ID = 7,
  CU_POINTER_ATTRIBUTE_IS_MANAGED = 8,
  CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9,
  CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE = 10,
  CU_POINTER_ATTRIBUTE_RANGE_START_ADDR = 11,
  CU_POINTER_ATTRIBUTE_RANGE_SIZE = 12,
  CU_POINTER_ATTRIBUTE_MAPPED = 13,
  CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES = 14,
  CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE = 15,
  CU_POINTER_ATTRIBUTE_ACCESS_FLAGS = 16,
};
enum CUmemorytype : int { CU_MEMORYTYPE_HOST = 1, CU_MEMORYTYPE_DEVICE = 2 };

enum CUstreamCaptureMode : int {
  CU_STREAM_CAPTURE_MODE_GLOBAL = 0,
  CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
  CU_STREAM_CAPTURE_MODE_RELAXED = 2,
};
enum CUstreamCaptureStatus : int {
  CU_STREAM_CAPTURE_STATUS_NONE = 0,
  CU_STREAM_CAPTURE_STATUS_ACTIVE = 1,
  CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2,
};
enum CUdriverProcAddressQueryResult : int {
  CU_GET_PROC_ADDRESS_SUCCESS = 0,
  CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND = 1,
  CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT = 2,
};

constexpr unsigned CU_STREAM_DEFAULT = 0, CU_STREAM_NON_BLOCKING = 1;
constexpr unsigned CU_EVENT_DEFAULT = 0, CU_EVENT_BLOCKING_SYNC = 1, CU_EVENT_DISABLE_TIMING = 2;
constexpr unsigned CU_MEMHOSTREGISTER_PORTABLE = 1, CU_MEMHOSTREGISTER_DEVICEMAP = 2,
                   CU_MEMHOSTREGISTER_IOMEMORY = 4, CU_MEMHOSTREGISTER_READ_ONLY = 8;
constexpr unsigned CU_MEMHOSTALLOC_PORTABLE = 1, CU_MEMHOSTALLOC_DEVICEMAP = 2,
                   CU_MEMHOSTALLOC_WRITECOMBINED = 4;
inline const CUstream CU_STREAM_LEGACY = reinterpret_cast<CUstream>(0x1);
inline const CUstream CU_STREAM_PER_THREAD = reinterpret_cast<CUstream>(0x2);

// The functions that driver/cuda calls: exported name, parameters.
// clang-format off
#define WARMSERVE_CUDA_FUNCTIONS(X) \
  X(cuInit, (unsigned)) \
  X(cuDriverGetVersion, (int*)) \
  X(cuGetErrorName, (CUresult, const char**)) \
  X(cuDeviceGetCount, (int*)) \
  X(cuDeviceGet, (CUdevice*, int)) \
  X(cuDeviceGetName, (char*, int, CUdevice)) \
  X(cuDeviceGetAttribute, (int*, CUdevice_attribute, CUdevice)) \
  X(cuDeviceCanAccessPeer, (int*, CUdevice, CUdevice)) \
  X(cuDevicePrimaryCtxRetain, (CUcontext*, CUdevice)) \
  X(cuDevicePrimaryCtxRelease_v2, (CUdevice)) \
  X(cuCtxGetCurrent, (CUcontext*)) \
  X(cuCtxSetCurrent, (CUcontext)) \
  X(cuCtxSynchronize, ()) \
  X(cuCtxGetStreamPriorityRange, (int*, int*)) \
  X(cuThreadExchangeStreamCaptureMode, (CUstreamCaptureMode*)) \
  X(cuMemGetInfo_v2, (std::size_t*, std::size_t*)) \
  X(cuMemGetAllocationGranularity, (std::size_t*, const CUmemAllocationProp*, CUmemAllocationGranularity_flags)) \
  X(cuMemAddressReserve, (CUdeviceptr*, std::size_t, std::size_t, CUdeviceptr, unsigned long long)) \
  X(cuMemAddressFree, (CUdeviceptr, std::size_t)) \
  X(cuMemCreate, (CUmemGenericAllocationHandle*, std::size_t, const CUmemAllocationProp*, unsigned long long)) \
  X(cuMemRelease, (CUmemGenericAllocationHandle)) \
  X(cuMemExportToShareableHandle, (void*, CUmemGenericAllocationHandle, CUmemAllocationHandleType, unsigned long long)) \
  X(cuMemImportFromShareableHandle, (CUmemGenericAllocationHandle*, void*, CUmemAllocationHandleType)) \
  X(cuMemMap, (CUdeviceptr, std::size_t, std::size_t, CUmemGenericAllocationHandle, unsigned long long)) \
  X(cuMemUnmap, (CUdeviceptr, std::size_t)) \
  X(cuMemSetAccess, (CUdeviceptr, std::size_t, const CUmemAccessDesc*, std::size_t)) \
  X(cuMemHostRegister_v2, (void*, std::size_t, unsigned)) \
  X(cuMemHostUnregister, (void*)) \
  X(cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void*, std::size_t, CUstream)) \
  X(cuMemcpyDtoHAsync_v2, (void*, CUdeviceptr, std::size_t, CUstream)) \
  X(cuMemcpyDtoDAsync_v2, (CUdeviceptr, CUdeviceptr, std::size_t, CUstream)) \
  X(cuMemsetD8Async, (CUdeviceptr, unsigned char, std::size_t, CUstream)) \
  X(cuStreamCreateWithPriority, (CUstream*, unsigned, int)) \
  X(cuStreamDestroy_v2, (CUstream)) \
  X(cuStreamSynchronize, (CUstream)) \
  X(cuStreamWaitEvent, (CUstream, CUevent, unsigned)) \
  X(cuStreamGetCtx, (CUstream, CUcontext*)) \
  X(cuStreamIsCapturing, (CUstream, CUstreamCaptureStatus*)) \
  X(cuEventCreate, (CUevent*, unsigned)) \
  X(cuEventDestroy_v2, (CUevent)) \
  X(cuEventRecord, (CUevent, CUstream)) \
  X(cuEventQuery, (CUevent)) \
  X(cuModuleLoadData, (CUmodule*, const void*)) \
  X(cuModuleUnload, (CUmodule)) \
  X(cuModuleGetFunction, (CUfunction*, CUmodule, const char*)) \
  X(cuLaunchKernel, (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**))
// clang-format on

}  // namespace warmserve::cuda
