#include "simcuda/call.h"
#include "simcuda/capture.h"

namespace warmserve::simcuda {
namespace {

constexpr unsigned kExternal = 1;    // flag of records and waits: make a separate node
constexpr unsigned kEventFlags = 7;  // BLOCKING_SYNC, DISABLE_TIMING, INTERPROCESS

CUresult record(Call& call, CUevent handle, CUstream stream_handle, unsigned flags) {
  Event* const event = call.event(handle);
  Stream* const stream = event ? call.stream(stream_handle) : nullptr;
  if (!stream) return call.status;
  if (flags > kExternal) return CUDA_ERROR_INVALID_VALUE;
  if (flags == kExternal) return CUDA_ERROR_NOT_SUPPORTED;  // event nodes are not simulated
  if (event->context != stream->context) return CUDA_ERROR_INVALID_HANDLE;  // [D h:15989]
  if (const CUresult refused = legacy_use(call, *stream); refused != CUDA_SUCCESS) return refused;
  CUresult result = CUDA_SUCCESS;
  if (!capture_record(*stream, *event, &result))
    call.sim->enqueue_record(*stream, *event, call.origin());
  return result;
}

// Returns SUCCESS if the event may be waited for or queried.
CUresult allowed(Call& call, const Event& event) {
  if (event.capture) {
    event.capture->invalid = true;
    return CUDA_ERROR_CAPTURED_EVENT;
  }
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  return state_of(*event.context);
}

CUresult elapsed(Function function, float* milliseconds, CUevent begin, CUevent end) {
  Call call(function, Need::work);
  if (!call) return call.status;
  const Event* const first = call.event(begin);
  const Event* const second = first ? call.event(end) : nullptr;
  if (!second) return call.status;
  if (!milliseconds) return CUDA_ERROR_INVALID_VALUE;
  for (const Event* const event : {first, second}) {
    if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
    if (!event->operation || (event->flags & CU_EVENT_DISABLE_TIMING))
      return CUDA_ERROR_INVALID_HANDLE;  // [D]
  }
  if (!first->operation->done || !second->operation->done) return call.not_ready();
  *milliseconds = static_cast<float>((second->operation->end - first->operation->end) * 1e-6);
  return CUDA_SUCCESS;
}

}  // namespace

CUresult cuEventCreate(CUevent* out, unsigned flags) {
  Call call(Function::cuEventCreate, Need::work);
  if (!call) return call.status;
  if (!out || flags > kEventFlags) return CUDA_ERROR_INVALID_VALUE;
  auto event = std::make_shared<Event>();
  event->context = call.context;
  event->flags = flags;
  *out = call.sim->events.add(std::move(event));
  return CUDA_SUCCESS;
}

// Legal also while the event is pending [D h:16131].
CUresult cuEventDestroy_v2(CUevent handle) {
  Call call(Function::cuEventDestroy_v2, Need::context);
  if (!call) return call.status;
  const auto event = call.sim->events.take(handle);
  return event ? state_of(*event->context) : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  Call call(Function::cuEventRecord, Need::work);
  return call ? record(call, event, stream, 0) : call.status;
}

CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) {
  Call call(Function::cuEventRecordWithFlags, Need::work);
  return call ? record(call, event, stream, flags) : call.status;
}

CUresult cuEventQuery(CUevent handle) {
  Call call(Function::cuEventQuery, Need::work);
  if (!call) return call.status;
  Event* const event = call.event(handle);
  if (!event) return call.status;
  if (const CUresult refused = allowed(call, *event); refused != CUDA_SUCCESS) return refused;
  if (!event->operation) return CUDA_SUCCESS;
  if (!event->operation->done) return call.not_ready();
  call.sim->detector.host_knows(event->clock);
  return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent handle) {
  Call call(Function::cuEventSynchronize, Need::work);
  if (!call) return call.status;
  Event* const event = call.event(handle);
  if (!event) return call.status;
  if (const CUresult refused = allowed(call, *event); refused != CUDA_SUCCESS) return refused;
  const VectorClock clock = event->clock;  // a copy: the event may be recorded again meanwhile
  Context* const context = event->context;
  const OperationPtr operation = event->operation;
  const CUresult result = call.sim->wait_for(call.lock, operation, context);
  if (result == CUDA_SUCCESS) call.sim->detector.host_knows(clock);
  return result;
}

CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned flags) {
  Call call(Function::cuStreamWaitEvent, Need::work);
  if (!call) return call.status;
  Event* const event = call.event(handle);
  Stream* const stream = event ? call.stream(stream_handle) : nullptr;
  if (!stream) return call.status;
  if (flags > kExternal) return CUDA_ERROR_INVALID_VALUE;
  if (flags == kExternal) return CUDA_ERROR_NOT_SUPPORTED;
  if (const CUresult refused = legacy_use(call, *stream); refused != CUDA_SUCCESS) return refused;
  CUresult result = CUDA_SUCCESS;
  if (!capture_wait(*stream, *event, &result))
    call.sim->enqueue_wait(*stream, *event, call.origin());
  return result;
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent begin, CUevent end) {
  return elapsed(Function::cuEventElapsedTime, milliseconds, begin, end);
}
CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent begin, CUevent end) {
  return elapsed(Function::cuEventElapsedTime_v2, milliseconds, begin, end);
}

}  // namespace warmserve::simcuda
