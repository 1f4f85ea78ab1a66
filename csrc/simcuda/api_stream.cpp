#include <algorithm>

#include "simcuda/call.h"
#include "simcuda/capture.h"

namespace warmserve::simcuda {
namespace {

constexpr int kGreatestPriority = -5;

CUresult create(Call& call, CUstream* out, unsigned flags, int priority) {
  if (!out || flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  // A priority out of range is clamped [D h:15002].
  const StreamPtr stream =
      call.sim->add_stream(call.context, flags, std::clamp(priority, kGreatestPriority, 0));
  *out = stream->handle = call.sim->streams.add(stream);
  return CUDA_SUCCESS;
}

CUresult enqueue_callback(Call& call, CUstream handle, Callback callback) {
  Stream* const stream = call.stream(handle);
  if (!stream) return call.status;
  if (const CUresult refused = legacy_use(call, *stream); refused != CUDA_SUCCESS) return refused;
  callback.stream = handle;
  if (!stream->capture) return call.sim->enqueue(*stream, callback, call.origin());
  // Callbacks of cuStreamAddCallback cannot be captured [D].
  return callback.stream_function ? refuse_captured(*stream) : add_node(*stream, callback);
}

}  // namespace

CUresult cuStreamCreate(CUstream* out, unsigned flags) {
  Call call(Function::cuStreamCreate, Need::work);
  return call ? create(call, out, flags, 0) : call.status;
}

CUresult cuStreamCreateWithPriority(CUstream* out, unsigned flags, int priority) {
  Call call(Function::cuStreamCreateWithPriority, Need::work);
  return call ? create(call, out, flags, priority) : call.status;
}

CUresult cuStreamDestroy_v2(CUstream handle) {
  Call call(Function::cuStreamDestroy_v2, Need::context);
  if (!call) return call.status;
  const StreamPtr stream = call.sim->streams.take(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;  // also for the default streams
  call.sim->remove_stream(call.lock, stream);
  return state_of(*stream->context);
}

CUresult cuStreamSynchronize(CUstream handle) {
  Call call(Function::cuStreamSynchronize, Need::work);
  if (!call) return call.status;
  Stream* const stream = call.stream(handle);
  if (!stream) return call.status;
  if (const CUresult refused = legacy_use(call, *stream); refused != CUDA_SUCCESS) return refused;
  if (const CUresult refused = refuse_captured(*stream); refused != CUDA_SUCCESS) return refused;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  return call.sim->synchronize_stream(call.lock, *stream);
}

CUresult cuStreamQuery(CUstream handle) {
  Call call(Function::cuStreamQuery, Need::work);
  if (!call) return call.status;
  Stream* const stream = call.stream(handle);
  if (!stream) return call.status;
  if (const CUresult refused = legacy_use(call, *stream); refused != CUDA_SUCCESS) return refused;
  if (const CUresult refused = refuse_captured(*stream); refused != CUDA_SUCCESS) return refused;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  if (!call.sim->stream_done(*stream)) return call.not_ready();
  call.sim->know_stream(*stream);
  return CUDA_SUCCESS;
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  Call call(Function::cuStreamGetPriority, Need::context);
  if (!call) return call.status;
  const Stream* const stream = call.stream(handle, true);
  if (!stream) return call.status;
  if (!priority) return CUDA_ERROR_INVALID_VALUE;
  *priority = stream->priority;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
  Call call(Function::cuStreamGetFlags, Need::context);
  if (!call) return call.status;
  const Stream* const stream = call.stream(handle, true);
  if (!stream) return call.status;
  if (!flags) return CUDA_ERROR_INVALID_VALUE;
  *flags = stream->flags;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
  Call call(Function::cuStreamGetCtx, Need::context);
  if (!call) return call.status;
  const Stream* const stream = call.stream(handle, true);
  if (!stream) return call.status;
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  *context = stream->context->handle;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
  Call call(Function::cuStreamGetId, Need::context);
  if (!call) return call.status;
  const Stream* const stream = call.stream(handle, true);
  if (!stream) return call.status;
  if (!id) return CUDA_ERROR_INVALID_VALUE;
  *id = stream->id;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetDevice(CUstream handle, CUdevice* device) {
  Call call(Function::cuStreamGetDevice, Need::context);
  if (!call) return call.status;
  const Stream* const stream = call.stream(handle, true);
  if (!stream) return call.status;
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  *device = stream->context->device;
  return CUDA_SUCCESS;
}

CUresult cuStreamAddCallback(CUstream handle, CUstreamCallback function, void* data,
                             unsigned flags) {
  Call call(Function::cuStreamAddCallback, Need::work);
  if (!call) return call.status;
  if (!function || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  return enqueue_callback(call, handle, {nullptr, function, nullptr, data});
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
  Call call(Function::cuLaunchHostFunc, Need::work);
  if (!call) return call.status;
  if (!function) return CUDA_ERROR_INVALID_VALUE;
  return enqueue_callback(call, handle, {function, nullptr, nullptr, data});
}

}  // namespace warmserve::simcuda
