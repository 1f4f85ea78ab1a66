// Contexts, and each thread's stack of contexts. A stack is local to its thread, and the contexts
// on it need not be alive.
#include <algorithm>

#include "simcuda/call.h"
#include "simcuda/capture.h"

namespace warmserve::simcuda {
namespace {

constexpr unsigned kContextFlags = 0xff;  // scheduling, map host, lmem resize, core dumps, ...

ThreadState& thread_of(const Simulator& sim) {
  ThreadState& thread = this_thread();
  if (thread.generation != sim.generation) {  // the contexts belong to a destroyed simulator
    thread.generation = sim.generation;
    thread.depth = 0;
    thread.mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  }
  return thread;
}

bool push(const Simulator& sim, Context* context) {
  ThreadState& thread = thread_of(sim);
  if (thread.depth == static_cast<int>(std::size(thread.stack))) return false;
  thread.stack[thread.depth++] = context;
  return true;
}

CUresult synchronize(Call& call, Context* context) {
  for (const StreamPtr& stream : context->streams)
    if (const CUresult refused = refuse_captured(*stream); refused != CUDA_SUCCESS) return refused;
  return call.sim->synchronize_context(call.lock, context);
}

// Returns the context of a handle; null means the current context.
Context* named(Call& call, CUcontext handle) {
  Context* const found = handle ? call.sim->find_context(handle) : call.context;
  if (!found) call.fail(CUDA_ERROR_INVALID_CONTEXT);
  return found;
}

}  // namespace

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice ordinal) {
  Call call(Function::cuDevicePrimaryCtxRetain, Need::driver);
  if (!call) return call.status;
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  if (!call.device(ordinal)) return call.status;
  Device& device = call.sim->devices[ordinal];
  if (!device.primary)
    device.primary = call.sim->create_context(ordinal, true, device.primary_flags);
  ++device.retained;
  *context = device.primary->handle;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice ordinal) {
  Call call(Function::cuDevicePrimaryCtxRelease_v2, Need::driver);
  if (!call) return call.status;
  if (!call.device(ordinal)) return call.status;
  Device& device = call.sim->devices[ordinal];
  if (device.retained == 0) return CUDA_ERROR_INVALID_CONTEXT;  // [D: listed for this]
  if (--device.retained == 0 && device.primary)
    call.sim->destroy_context(call.lock, device.primary, false);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice ordinal, unsigned* flags, int* active) {
  Call call(Function::cuDevicePrimaryCtxGetState, Need::driver);
  if (!call) return call.status;
  if (!flags || !active) return CUDA_ERROR_INVALID_VALUE;
  if (!call.device(ordinal)) return call.status;
  const Device& device = call.sim->devices[ordinal];
  *flags = device.primary_flags;
  *active = device.primary != nullptr;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice ordinal, unsigned flags) {
  Call call(Function::cuDevicePrimaryCtxSetFlags_v2, Need::driver);
  if (!call) return call.status;
  if (flags > kContextFlags) return CUDA_ERROR_INVALID_VALUE;
  if (!call.device(ordinal)) return call.status;
  Device& device = call.sim->devices[ordinal];
  device.primary_flags = flags;
  if (device.primary) device.primary->flags = flags;
  return CUDA_SUCCESS;
}

// Destroys the context even while it is retained.
CUresult cuDevicePrimaryCtxReset_v2(CUdevice ordinal) {
  Call call(Function::cuDevicePrimaryCtxReset_v2, Need::driver);
  if (!call) return call.status;
  if (!call.device(ordinal)) return call.status;
  if (Context* const context = call.sim->devices[ordinal].primary)
    call.sim->destroy_context(call.lock, context, false);
  return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v2(CUcontext* context, unsigned flags, CUdevice ordinal) {
  Call call(Function::cuCtxCreate_v2, Need::driver);
  if (!call) return call.status;
  if (!context || flags > kContextFlags) return CUDA_ERROR_INVALID_VALUE;
  if (!call.device(ordinal)) return call.status;
  Context* const made = call.sim->create_context(ordinal, false, flags);
  push(*call.sim, made);
  *context = made->handle;
  return CUDA_SUCCESS;
}

CUresult cuCtxDestroy_v2(CUcontext handle) {
  Call call(Function::cuCtxDestroy_v2, Need::driver);
  if (!call) return call.status;
  Context* const context = handle ? call.sim->find_context(handle) : nullptr;
  if (!context || context->primary) return CUDA_ERROR_INVALID_CONTEXT;
  if (context->destroyed) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  call.sim->destroy_context(call.lock, context, false);
  ThreadState& thread = thread_of(*call.sim);
  if (thread.depth > 0 && thread.stack[thread.depth - 1] == context) --thread.depth;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext handle) {
  Call call(Function::cuCtxSetCurrent, Need::driver);
  if (!call) return call.status;
  ThreadState& thread = thread_of(*call.sim);
  if (!handle) {
    if (thread.depth > 0) --thread.depth;
    return CUDA_SUCCESS;
  }
  Context* const context = named(call, handle);
  if (!context) return call.status;
  if (context->destroyed) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  if (thread.depth == 0) {
    push(*call.sim, context);
  } else {
    thread.stack[thread.depth - 1] = context;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  Call call(Function::cuCtxGetCurrent, Need::driver);
  if (!call) return call.status;
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  *context = call.context ? call.context->handle : nullptr;
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext handle) {
  Call call(Function::cuCtxPushCurrent_v2, Need::driver);
  if (!call) return call.status;
  Context* const context = handle ? named(call, handle) : nullptr;
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  if (context->destroyed) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  return push(*call.sim, context) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  Call call(Function::cuCtxPopCurrent_v2, Need::driver);
  if (!call) return call.status;
  if (!call.context) return CUDA_ERROR_INVALID_CONTEXT;
  --thread_of(*call.sim).depth;
  if (context) *context = call.context->handle;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  Call call(Function::cuCtxGetDevice, Need::context);
  if (!call) return call.status;
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  *device = call.context->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice_v2(CUdevice* device, CUcontext handle) {
  Call call(Function::cuCtxGetDevice_v2, Need::driver);
  if (!call) return call.status;
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  if (const Context* const context = named(call, handle)) *device = context->device;
  return call.status;
}

CUresult cuCtxSynchronize() {
  Call call(Function::cuCtxSynchronize, Need::work);
  if (!call) return call.status;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  return synchronize(call, call.context);
}

CUresult cuCtxSynchronize_v2(CUcontext handle) {
  Call call(Function::cuCtxSynchronize_v2, Need::driver);
  if (!call) return call.status;
  Context* const context = named(call, handle);
  if (!context) return call.status;
  if (const CUresult dead = state_of(*context); dead != CUDA_SUCCESS) return dead;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  return synchronize(call, context);
}

CUresult cuCtxGetApiVersion(CUcontext handle, unsigned* version) {
  Call call(Function::cuCtxGetApiVersion, Need::driver);
  if (!call) return call.status;
  if (!version) return CUDA_ERROR_INVALID_VALUE;
  if (named(call, handle)) *version = 3020;
  return call.status;
}

CUresult cuCtxGetId(CUcontext handle, unsigned long long* id) {
  Call call(Function::cuCtxGetId, Need::driver);
  if (!call) return call.status;
  if (!id) return CUDA_ERROR_INVALID_VALUE;
  if (const Context* const context = named(call, handle)) *id = context->id;
  return call.status;
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  Call call(Function::cuCtxGetStreamPriorityRange, Need::context);
  if (!call) return call.status;
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetFlags(unsigned* flags) {
  Call call(Function::cuCtxGetFlags, Need::context);
  if (!call) return call.status;
  if (!flags) return CUDA_ERROR_INVALID_VALUE;
  *flags = call.context->flags;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(std::size_t* value, int limit) {
  Call call(Function::cuCtxGetLimit, Need::context);
  if (!call) return call.status;
  if (!value) return CUDA_ERROR_INVALID_VALUE;
  if (limit < 0 || limit >= static_cast<int>(call.context->limits.size()))
    return CUDA_ERROR_INVALID_VALUE;
  *value = call.context->limits[limit];
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(int limit, std::size_t value) {
  Call call(Function::cuCtxSetLimit, Need::context);
  if (!call) return call.status;
  if (limit < 0 || limit > 6) return CUDA_ERROR_INVALID_VALUE;  // higher limits are read-only
  call.context->limits[limit] = value;
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  Call call(Function::cuThreadExchangeStreamCaptureMode, Need::driver);
  if (!call) return call.status;
  if (!mode || *mode < CU_STREAM_CAPTURE_MODE_GLOBAL || *mode > CU_STREAM_CAPTURE_MODE_RELAXED)
    return CUDA_ERROR_INVALID_VALUE;
  std::swap(*mode, thread_of(*call.sim).mode);
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(std::size_t* available, std::size_t* total) {
  Call call(Function::cuMemGetInfo_v2, Need::work);
  if (!call) return call.status;
  if (!available || !total) return CUDA_ERROR_INVALID_VALUE;
  *available = call.sim->memory.available(call.context->device);
  *total = call.sim->options.memory;
  return CUDA_SUCCESS;
}

}  // namespace warmserve::simcuda
