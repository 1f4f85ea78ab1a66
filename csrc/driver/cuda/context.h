// A device's primary context, which torch and CuPy share, and the way to make calls in it.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "driver/cuda/library.h"
#include "driver/driver.h"

namespace warmserve::cuda {

class Context {
 public:
  // Throws general, with a sentence that says what to do; invalid_argument for an unknown ordinal.
  Context(const std::string& library, int ordinal);
  ~Context();
  Context(const Context&) = delete;

  const Library& library() const noexcept { return library_; }
  CUdevice device() const noexcept { return device_; }
  const std::string& name() const noexcept { return name_; }  // "cuda:0 (NVIDIA H100)"
  // Returns `unknown` if the driver does not know the attribute.
  int attribute(CUdevice_attribute which, int unknown = 0) const;
  CUcontext handle() const noexcept { return context_; }
  // Returns another device, and retains its primary context as long as this object lives: access
  // can be set only for a device that has a context. Throws invalid_argument if the device cannot
  // access this device's memory, general if it refuses a context.
  CUdevice open_peer(int ordinal);
  bool lost() const noexcept { return lost_.load() != CUDA_SUCCESS; }
  std::string detail() const;  // Driver::detail

  // While it lives, the context is current on this thread and the thread is in relaxed capture
  // mode, so that calls do not break a stream capture elsewhere in the process. The destructor
  // restores the thread's previous state.
  class Scope {
   public:
    explicit Scope(Context& context);
    ~Scope();
    Scope(const Scope&) = delete;
    Status status() const noexcept { return status_; }  // if not ok, make no call

   private:
    Context& context_;
    CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
    CUcontext before_ = nullptr;
    bool switched_ = false, relaxed_ = false;
    Status status_;
  };

  // Translates a result of `function`. An error from which the context cannot recover is sticky:
  // every later scope has the status device_lost. Others' objects may cause such errors too (a
  // stream of a context that was destroyed), so the context counts as lost only if a stream of our
  // own does not work in it either.
  Status translate(const char* function, CUresult result);
  // Calls a function in a scope of its own.
  template <typename Function, typename... Args>
  Status call(const char* name, Function function, Args... args) {
    const Scope scope(*this);
    return scope.status() == Status::ok ? translate(name, function(args...)) : scope.status();
  }

 private:
  bool works() const;

  const Library library_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  std::string name_;
  std::vector<CUdevice> peers_;  // whose primary contexts are retained
  std::atomic<CUresult> lost_{CUDA_SUCCESS};
};

// Calls a function of the library by its name, through context.call.
#define WARMSERVE_CUDA_CALL(context, function, ...) \
  (context).call(#function, (context).library().function, __VA_ARGS__)

}  // namespace warmserve::cuda
