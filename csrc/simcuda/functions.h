// The cu* functions that the simulated driver exports: symbol, name and CUDA version for
// cuGetProcAddress, and parameters. Enumerations whose values the simulator does not use are
// declared as unsigned or int.
#pragma once

#include <vector>

#include "driver/cuda/abi.h"

#define WARMSERVE_SIMCUDA_EXPORT __attribute__((visibility("default")))

namespace warmserve::simcuda {

using namespace warmserve::cuda;  // types and constants of the driver API

struct CUgraphEdgeData;
using ProcStatus = CUdriverProcAddressQueryResult;

// clang-format off
#define WARMSERVE_SIMCUDA_FUNCTIONS(X) \
  X(cuInit, cuInit, 2000, (unsigned flags)) \
  X(cuDriverGetVersion, cuDriverGetVersion, 2020, (int* version)) \
  X(cuGetErrorName, cuGetErrorName, 6000, (CUresult error, const char** name)) \
  X(cuGetErrorString, cuGetErrorString, 6000, (CUresult error, const char** text)) \
  X(cuGetProcAddress, cuGetProcAddress, 11030, (const char* symbol, void** function, int version, unsigned long long flags)) \
  X(cuGetProcAddress_v2, cuGetProcAddress, 12000, (const char* symbol, void** function, int version, unsigned long long flags, ProcStatus* status)) \
  X(cuDeviceGetCount, cuDeviceGetCount, 2000, (int* count)) \
  X(cuDeviceGet, cuDeviceGet, 2000, (CUdevice* device, int ordinal)) \
  X(cuDeviceGetName, cuDeviceGetName, 2000, (char* name, int length, CUdevice device)) \
  X(cuDeviceGetUuid, cuDeviceGetUuid, 9020, (CUuuid* uuid, CUdevice device)) \
  X(cuDeviceGetUuid_v2, cuDeviceGetUuid, 11040, (CUuuid* uuid, CUdevice device)) \
  X(cuDeviceTotalMem_v2, cuDeviceTotalMem, 3020, (std::size_t* bytes, CUdevice device)) \
  X(cuDeviceGetAttribute, cuDeviceGetAttribute, 2000, (int* value, CUdevice_attribute attribute, CUdevice device)) \
  X(cuDeviceGetPCIBusId, cuDeviceGetPCIBusId, 4010, (char* id, int length, CUdevice device)) \
  X(cuDeviceGetByPCIBusId, cuDeviceGetByPCIBusId, 4010, (CUdevice* device, const char* id)) \
  X(cuDeviceCanAccessPeer, cuDeviceCanAccessPeer, 4000, (int* can, CUdevice device, CUdevice peer)) \
  X(cuDeviceComputeCapability, cuDeviceComputeCapability, 2000, (int* major, int* minor, CUdevice device)) \
  X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, 7000, (CUcontext* context, CUdevice device)) \
  X(cuDevicePrimaryCtxRelease_v2, cuDevicePrimaryCtxRelease, 11000, (CUdevice device)) \
  X(cuDevicePrimaryCtxGetState, cuDevicePrimaryCtxGetState, 7000, (CUdevice device, unsigned* flags, int* active)) \
  X(cuDevicePrimaryCtxSetFlags_v2, cuDevicePrimaryCtxSetFlags, 11000, (CUdevice device, unsigned flags)) \
  X(cuDevicePrimaryCtxReset_v2, cuDevicePrimaryCtxReset, 11000, (CUdevice device)) \
  X(cuCtxCreate_v2, cuCtxCreate, 3020, (CUcontext* context, unsigned flags, CUdevice device)) \
  X(cuCtxDestroy_v2, cuCtxDestroy, 4000, (CUcontext context)) \
  X(cuCtxSetCurrent, cuCtxSetCurrent, 4000, (CUcontext context)) \
  X(cuCtxGetCurrent, cuCtxGetCurrent, 4000, (CUcontext* context)) \
  X(cuCtxPushCurrent_v2, cuCtxPushCurrent, 4000, (CUcontext context)) \
  X(cuCtxPopCurrent_v2, cuCtxPopCurrent, 4000, (CUcontext* context)) \
  X(cuCtxGetDevice, cuCtxGetDevice, 2000, (CUdevice* device)) \
  X(cuCtxGetDevice_v2, cuCtxGetDevice, 13000, (CUdevice* device, CUcontext context)) \
  X(cuCtxSynchronize, cuCtxSynchronize, 2000, ()) \
  X(cuCtxSynchronize_v2, cuCtxSynchronize, 13000, (CUcontext context)) \
  X(cuCtxGetApiVersion, cuCtxGetApiVersion, 3020, (CUcontext context, unsigned* version)) \
  X(cuCtxGetId, cuCtxGetId, 12000, (CUcontext context, unsigned long long* id)) \
  X(cuCtxGetStreamPriorityRange, cuCtxGetStreamPriorityRange, 5050, (int* least, int* greatest)) \
  X(cuCtxGetFlags, cuCtxGetFlags, 7000, (unsigned* flags)) \
  X(cuCtxGetLimit, cuCtxGetLimit, 3010, (std::size_t* value, int limit)) \
  X(cuCtxSetLimit, cuCtxSetLimit, 3010, (int limit, std::size_t value)) \
  X(cuMemGetInfo_v2, cuMemGetInfo, 3020, (std::size_t* available, std::size_t* total)) \
  X(cuMemGetAllocationGranularity, cuMemGetAllocationGranularity, 10020, (std::size_t* bytes, const CUmemAllocationProp* prop, CUmemAllocationGranularity_flags option)) \
  X(cuMemGetAllocationPropertiesFromHandle, cuMemGetAllocationPropertiesFromHandle, 10020, (CUmemAllocationProp* prop, CUmemGenericAllocationHandle handle)) \
  X(cuMemAddressReserve, cuMemAddressReserve, 10020, (CUdeviceptr* out, std::size_t bytes, std::size_t alignment, CUdeviceptr hint, unsigned long long flags)) \
  X(cuMemAddressFree, cuMemAddressFree, 10020, (CUdeviceptr address, std::size_t bytes)) \
  X(cuMemCreate, cuMemCreate, 10020, (CUmemGenericAllocationHandle* out, std::size_t bytes, const CUmemAllocationProp* prop, unsigned long long flags)) \
  X(cuMemRelease, cuMemRelease, 10020, (CUmemGenericAllocationHandle handle)) \
  X(cuMemMap, cuMemMap, 10020, (CUdeviceptr address, std::size_t bytes, std::size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags)) \
  X(cuMemUnmap, cuMemUnmap, 10020, (CUdeviceptr address, std::size_t bytes)) \
  X(cuMemSetAccess, cuMemSetAccess, 10020, (CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc* descs, std::size_t count)) \
  X(cuMemGetAccess, cuMemGetAccess, 10020, (unsigned long long* flags, const CUmemLocation* location, CUdeviceptr address)) \
  X(cuMemRetainAllocationHandle, cuMemRetainAllocationHandle, 11000, (CUmemGenericAllocationHandle* out, void* address)) \
  X(cuMemExportToShareableHandle, cuMemExportToShareableHandle, 10020, (void* out, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type, unsigned long long flags)) \
  X(cuMemImportFromShareableHandle, cuMemImportFromShareableHandle, 10020, (CUmemGenericAllocationHandle* out, void* os_handle, CUmemAllocationHandleType type)) \
  X(cuMemAlloc_v2, cuMemAlloc, 3020, (CUdeviceptr* out, std::size_t bytes)) \
  X(cuMemFree_v2, cuMemFree, 3020, (CUdeviceptr address)) \
  X(cuMemGetAddressRange_v2, cuMemGetAddressRange, 3020, (CUdeviceptr* base, std::size_t* bytes, CUdeviceptr address)) \
  X(cuMemAllocHost_v2, cuMemAllocHost, 3020, (void** out, std::size_t bytes)) \
  X(cuMemHostAlloc, cuMemHostAlloc, 2020, (void** out, std::size_t bytes, unsigned flags)) \
  X(cuMemFreeHost, cuMemFreeHost, 2000, (void* address)) \
  X(cuMemHostRegister_v2, cuMemHostRegister, 6050, (void* address, std::size_t bytes, unsigned flags)) \
  X(cuMemHostUnregister, cuMemHostUnregister, 4000, (void* address)) \
  X(cuMemHostGetDevicePointer_v2, cuMemHostGetDevicePointer, 3020, (CUdeviceptr* out, void* address, unsigned flags)) \
  X(cuMemHostGetFlags, cuMemHostGetFlags, 2030, (unsigned* flags, void* address)) \
  X(cuPointerGetAttribute, cuPointerGetAttribute, 4000, (void* data, CUpointer_attribute attribute, CUdeviceptr address)) \
  X(cuPointerGetAttributes, cuPointerGetAttributes, 7000, (unsigned count, CUpointer_attribute* attributes, void** data, CUdeviceptr address)) \
  X(cuPointerSetAttribute, cuPointerSetAttribute, 6000, (const void* value, CUpointer_attribute attribute, CUdeviceptr address)) \
  X(cuMemcpy, cuMemcpy, 4000, (CUdeviceptr to, CUdeviceptr from, std::size_t bytes)) \
  X(cuMemcpyAsync, cuMemcpyAsync, 4000, (CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream)) \
  X(cuMemcpyHtoD_v2, cuMemcpyHtoD, 3020, (CUdeviceptr to, const void* from, std::size_t bytes)) \
  X(cuMemcpyHtoDAsync_v2, cuMemcpyHtoDAsync, 3020, (CUdeviceptr to, const void* from, std::size_t bytes, CUstream stream)) \
  X(cuMemcpyDtoH_v2, cuMemcpyDtoH, 3020, (void* to, CUdeviceptr from, std::size_t bytes)) \
  X(cuMemcpyDtoHAsync_v2, cuMemcpyDtoHAsync, 3020, (void* to, CUdeviceptr from, std::size_t bytes, CUstream stream)) \
  X(cuMemcpyDtoD_v2, cuMemcpyDtoD, 3020, (CUdeviceptr to, CUdeviceptr from, std::size_t bytes)) \
  X(cuMemcpyDtoDAsync_v2, cuMemcpyDtoDAsync, 3020, (CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream)) \
  X(cuMemsetD8_v2, cuMemsetD8, 3020, (CUdeviceptr to, unsigned char value, std::size_t count)) \
  X(cuMemsetD8Async, cuMemsetD8Async, 3020, (CUdeviceptr to, unsigned char value, std::size_t count, CUstream stream)) \
  X(cuMemsetD16_v2, cuMemsetD16, 3020, (CUdeviceptr to, unsigned short value, std::size_t count)) \
  X(cuMemsetD16Async, cuMemsetD16Async, 3020, (CUdeviceptr to, unsigned short value, std::size_t count, CUstream stream)) \
  X(cuMemsetD32_v2, cuMemsetD32, 3020, (CUdeviceptr to, unsigned value, std::size_t count)) \
  X(cuMemsetD32Async, cuMemsetD32Async, 3020, (CUdeviceptr to, unsigned value, std::size_t count, CUstream stream)) \
  X(cuStreamCreate, cuStreamCreate, 2000, (CUstream* out, unsigned flags)) \
  X(cuStreamCreateWithPriority, cuStreamCreateWithPriority, 5050, (CUstream* out, unsigned flags, int priority)) \
  X(cuStreamDestroy_v2, cuStreamDestroy, 4000, (CUstream stream)) \
  X(cuStreamSynchronize, cuStreamSynchronize, 2000, (CUstream stream)) \
  X(cuStreamQuery, cuStreamQuery, 2000, (CUstream stream)) \
  X(cuStreamWaitEvent, cuStreamWaitEvent, 3020, (CUstream stream, CUevent event, unsigned flags)) \
  X(cuStreamGetPriority, cuStreamGetPriority, 5050, (CUstream stream, int* priority)) \
  X(cuStreamGetFlags, cuStreamGetFlags, 5050, (CUstream stream, unsigned* flags)) \
  X(cuStreamGetCtx, cuStreamGetCtx, 9020, (CUstream stream, CUcontext* context)) \
  X(cuStreamGetId, cuStreamGetId, 12000, (CUstream stream, unsigned long long* id)) \
  X(cuStreamGetDevice, cuStreamGetDevice, 12080, (CUstream stream, CUdevice* device)) \
  X(cuStreamAddCallback, cuStreamAddCallback, 5000, (CUstream stream, CUstreamCallback function, void* data, unsigned flags)) \
  X(cuLaunchHostFunc, cuLaunchHostFunc, 10000, (CUstream stream, CUhostFn function, void* data)) \
  X(cuStreamBeginCapture_v2, cuStreamBeginCapture, 10010, (CUstream stream, CUstreamCaptureMode mode)) \
  X(cuStreamEndCapture, cuStreamEndCapture, 10000, (CUstream stream, CUgraph* out)) \
  X(cuStreamIsCapturing, cuStreamIsCapturing, 10000, (CUstream stream, CUstreamCaptureStatus* status)) \
  X(cuStreamGetCaptureInfo_v2, cuStreamGetCaptureInfo, 11030, (CUstream stream, CUstreamCaptureStatus* status, unsigned long long* id, CUgraph* graph, const CUgraphNode** nodes, std::size_t* count)) \
  X(cuThreadExchangeStreamCaptureMode, cuThreadExchangeStreamCaptureMode, 10010, (CUstreamCaptureMode* mode)) \
  X(cuGraphInstantiate_v2, cuGraphInstantiate, 11000, (CUgraphExec* out, CUgraph graph, CUgraphNode* bad_node, char* log, std::size_t log_bytes)) \
  X(cuGraphInstantiateWithFlags, cuGraphInstantiateWithFlags, 11040, (CUgraphExec* out, CUgraph graph, unsigned long long flags)) \
  X(cuGraphGetNodes, cuGraphGetNodes, 10000, (CUgraph graph, CUgraphNode* nodes, std::size_t* count)) \
  X(cuGraphLaunch, cuGraphLaunch, 10000, (CUgraphExec exec, CUstream stream)) \
  X(cuGraphExecDestroy, cuGraphExecDestroy, 10000, (CUgraphExec exec)) \
  X(cuGraphDestroy, cuGraphDestroy, 10000, (CUgraph graph)) \
  X(cuEventCreate, cuEventCreate, 2000, (CUevent* out, unsigned flags)) \
  X(cuEventRecord, cuEventRecord, 2000, (CUevent event, CUstream stream)) \
  X(cuEventRecordWithFlags, cuEventRecordWithFlags, 11010, (CUevent event, CUstream stream, unsigned flags)) \
  X(cuEventQuery, cuEventQuery, 2000, (CUevent event)) \
  X(cuEventSynchronize, cuEventSynchronize, 2000, (CUevent event)) \
  X(cuEventDestroy_v2, cuEventDestroy, 4000, (CUevent event)) \
  X(cuEventElapsedTime, cuEventElapsedTime, 2000, (float* milliseconds, CUevent begin, CUevent end)) \
  X(cuEventElapsedTime_v2, cuEventElapsedTime, 12080, (float* milliseconds, CUevent begin, CUevent end)) \
  X(cuModuleLoadData, cuModuleLoadData, 2000, (CUmodule* out, const void* image)) \
  X(cuModuleLoadDataEx, cuModuleLoadDataEx, 2010, (CUmodule* out, const void* image, unsigned count, int* options, void** values)) \
  X(cuModuleUnload, cuModuleUnload, 2000, (CUmodule module)) \
  X(cuModuleGetFunction, cuModuleGetFunction, 2000, (CUfunction* out, CUmodule module, const char* name)) \
  X(cuFuncGetAttribute, cuFuncGetAttribute, 2020, (int* value, int attribute, CUfunction function)) \
  X(cuLaunchKernel, cuLaunchKernel, 4000, (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters, void** extra))
// clang-format on

extern "C" {
#define X(name, base, since, parameters) WARMSERVE_SIMCUDA_EXPORT CUresult name parameters;
WARMSERVE_SIMCUDA_FUNCTIONS(X)
#undef X
}

enum class Function : unsigned short {
#define X(name, base, since, parameters) name,
  WARMSERVE_SIMCUDA_FUNCTIONS(X)
#undef X
};
#define X(name, base, since, parameters) +1
constexpr std::size_t kFunctions = 0 WARMSERVE_SIMCUDA_FUNCTIONS(X);
#undef X

const char* name_of(Function function) noexcept;
// Returns a function by its symbol, or by its name without version; kFunctions if it is unknown.
std::size_t function_index(const char* name) noexcept;
// Returns all versions of a function by its name without version, or the one function of a symbol.
std::vector<Function> functions_named(const char* name);

}  // namespace warmserve::simcuda
