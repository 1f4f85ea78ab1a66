#include "driver/cuda/context.h"

#include "base/error.h"

namespace warmserve::cuda {
namespace {

// The call that failed last on this thread. All contexts share it, because callers ask at once.
thread_local const char* failed_call = nullptr;
thread_local CUresult failed_with = CUDA_SUCCESS;

}  // namespace

Context::Context(const std::string& library, int ordinal) : library_(library) {
  int count = 0;
  library_.cuDeviceGetCount(&count);
  const std::string asked = "cuda:" + std::to_string(ordinal);
  if (ordinal < 0 || ordinal >= count)
    throw Error(ErrorKind::invalid_argument,
                "no device " + asked + ": " + std::to_string(count) + " are visible" +
                    (count ? ", cuda:0 to cuda:" + std::to_string(count - 1) : ""));
  const auto require = [&](CUresult result, const char* function) {
    if (result != CUDA_SUCCESS)
      throw Error(ErrorKind::general, asked + ": " + function + " returned " + describe(result));
  };
  require(library_.cuDeviceGet(&device_, ordinal), "cuDeviceGet");
  char name[128] = {};
  require(library_.cuDeviceGetName(name, sizeof name - 1, device_), "cuDeviceGetName");
  name_ = asked + " (" + name + ")";
  if (!attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED))
    throw Error(ErrorKind::general,
                name_ + " has no virtual memory management, which this package needs");
  const CUresult result = library_.cuDevicePrimaryCtxRetain(&context_, device_);
  if (result != CUDA_SUCCESS)
    throw Error(ErrorKind::general, "the context of " + name_ +
                                        " is unavailable: " + describe(result) +
                                        "; is another process using it exclusively?");
}

// A lost context is not released: the objects that the last release would destroy are gone.
Context::~Context() {
  if (lost()) return;
  for (const CUdevice peer : peers_) library_.cuDevicePrimaryCtxRelease_v2(peer);
  library_.cuDevicePrimaryCtxRelease_v2(device_);
}

int Context::attribute(CUdevice_attribute which, int unknown) const {
  int value = 0;
  return library_.cuDeviceGetAttribute(&value, which, device_) == CUDA_SUCCESS ? value : unknown;
}

CUdevice Context::open_peer(int ordinal) {
  CUdevice peer = 0;
  int reaches = 0;
  const std::string asked = "cuda:" + std::to_string(ordinal);
  if (library_.cuDeviceGet(&peer, ordinal) != CUDA_SUCCESS)
    throw Error(ErrorKind::invalid_argument, "no device " + asked);
  if (peer == device_ || library_.cuDeviceCanAccessPeer(&reaches, peer, device_) != CUDA_SUCCESS ||
      !reaches)
    throw Error(ErrorKind::invalid_argument, asked + " does not reach the memory of " + name_);
  CUcontext context = nullptr;
  const CUresult result = library_.cuDevicePrimaryCtxRetain(&context, peer);
  if (result != CUDA_SUCCESS)
    throw Error(ErrorKind::general, "the context of " + asked + ", a peer of " + name_ +
                                        ", is unavailable: cuDevicePrimaryCtxRetain returned " +
                                        describe(result));
  peers_.push_back(peer);
  return peer;
}

std::string Context::detail() const {
  if (const CUresult lost = lost_.load())
    return "the CUDA context died of " + describe(lost) +
           "; restart the process to use the device again";
  return failed_call ? std::string(failed_call) + " returned " + describe(failed_with) : "";
}

Status Context::translate(const char* function, CUresult result) {
  if (result == CUDA_SUCCESS) return Status::ok;
  if (result == CUDA_ERROR_NOT_READY) return Status::not_ready;
  failed_call = function;
  failed_with = result;
  if (is_sticky(result) && !works()) {
    CUresult none = CUDA_SUCCESS;
    lost_.compare_exchange_strong(none, result);  // only the first error is kept
    return Status::device_lost;
  }
  switch (result) {
    case CUDA_ERROR_OUT_OF_MEMORY: return Status::out_of_memory;
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_INVALID_HANDLE: return Status::invalid;
    default: return Status::failed;
  }
}

// Makes a stream and waits for it. In a context that has died, both fail.
bool Context::works() const {
  CUcontext before = nullptr;
  if (library_.cuCtxGetCurrent(&before) != CUDA_SUCCESS) return false;
  if (before != context_ && library_.cuCtxSetCurrent(context_) != CUDA_SUCCESS) return false;
  CUstream own = nullptr;
  CUresult result = library_.cuStreamCreateWithPriority(&own, CU_STREAM_NON_BLOCKING, 0);
  if (result == CUDA_SUCCESS) {
    result = library_.cuStreamSynchronize(own);
    library_.cuStreamDestroy_v2(own);
  }
  if (before != context_) library_.cuCtxSetCurrent(before);
  return !is_sticky(result);
}

Context::Scope::Scope(Context& context) : context_(context) {
  failed_call = nullptr;
  if (context_.lost()) {
    status_ = Status::device_lost;
    return;
  }
  const Library& cuda = context_.library_;
  status_ = context_.translate("cuCtxGetCurrent", cuda.cuCtxGetCurrent(&before_));
  if (status_ == Status::ok && before_ != context_.context_) {
    status_ = context_.translate("cuCtxSetCurrent", cuda.cuCtxSetCurrent(context_.context_));
    switched_ = status_ == Status::ok;
  }
  if (status_ != Status::ok) return;
  status_ = context_.translate("cuThreadExchangeStreamCaptureMode",
                               cuda.cuThreadExchangeStreamCaptureMode(&mode_));
  relaxed_ = status_ == Status::ok;
}

// A failure here leaves the thread relaxed, or with our context current, which does not disturb us.
// (With push and pop, each failed pop would leave a context on the thread's stack.) We ignore the
// error, because it may concern the previous context, which may be destroyed by now.
Context::Scope::~Scope() {
  const Library& cuda = context_.library_;
  if (relaxed_) cuda.cuThreadExchangeStreamCaptureMode(&mode_);
  if (switched_) cuda.cuCtxSetCurrent(before_);
}

}  // namespace warmserve::cuda
