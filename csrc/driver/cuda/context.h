// A device's primary context, which torch and CuPy live in too, and how calls are made in it.
#pragma once

#include <atomic>
#include <string>

#include "driver/cuda/library.h"
#include "driver/driver.h"

namespace warmserve::cuda {

class Context {
 public:
  // Throws general with a sentence that says what to do; invalid_argument for an ordinal that is
  // not there.
  Context(const std::string& library, int ordinal);
  ~Context();
  Context(const Context&) = delete;

  const Library& library() const noexcept { return library_; }
  CUdevice device() const noexcept { return device_; }
  const std::string& name() const noexcept { return name_; }  // "cuda:0 (NVIDIA H100)"
  int attribute(CUdevice_attribute which) const;              // 0 where the driver does not know it
  // Another device, which reaches this one's memory. Throws invalid_argument where it does not.
  CUdevice peer(int ordinal) const;
  bool lost() const noexcept { return lost_.load() != CUDA_SUCCESS; }
  std::string detail() const;  // Driver::detail

  // The context current on this thread and the thread in relaxed capture mode, so that a capture
  // elsewhere in the process is not broken by what is called; the thread is left as it was.
  class Scope {
   public:
    explicit Scope(Context& context);
    ~Scope();
    Scope(const Scope&) = delete;
    Status status() const noexcept { return status_; }  // not ok: call nothing

   private:
    Context& context_;
    CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
    CUcontext before_ = nullptr;
    bool switched_ = false, relaxed_ = false;
    Status status_;
  };

  // What a result means. An error that the context does not recover from is kept: scopes say so
  // from then on.
  Status translate(const char* function, CUresult result);
  // Calls one function in a scope of its own.
  template <typename Function, typename... Args>
  Status call(const char* name, Function function, Args... args) {
    const Scope scope(*this);
    return scope.status() == Status::ok ? translate(name, function(args...)) : scope.status();
  }

 private:
  const Library library_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  std::string name_;
  std::atomic<CUresult> lost_{CUDA_SUCCESS};
};

// context.call of a function by its name alone.
#define WARMSERVE_CUDA_CALL(context, function, ...) \
  (context).call(#function, (context).library().function, __VA_ARGS__)

}  // namespace warmserve::cuda
