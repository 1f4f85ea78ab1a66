// libcuda, opened at run time: every function that this project calls, by its exported name.
#pragma once

#include <chrono>
#include <string>

#include "driver/cuda/abi.h"

namespace warmserve::cuda {

// Stays open as long as the process lives, because streams of other libraries may still use it.
struct Library {
  // Throws general, with a sentence that says what to do, if the library is missing, is not a CUDA
  // driver, is older than 12.0, or cannot start.
  explicit Library(const std::string& name);

  int version = 0;  // from cuDriverGetVersion: 12040 means 12.4
#define X(name, parameters) CUresult(*name) parameters = nullptr;
  WARMSERVE_CUDA_FUNCTIONS(X)
#undef X
  // Functions of the simulated driver, on whose clock reads of files and sleeps take time; null in
  // other libraries.
  void (*simcuda_host_read)(unsigned long long bytes) = nullptr;
  void (*simcuda_sleep)(unsigned long long nanoseconds) = nullptr;

  // Blocks. On the simulated driver's clock, if it has one of its own.
  void sleep(std::chrono::nanoseconds time) const;
};

// Returns "CUDA_ERROR_ILLEGAL_ADDRESS (700)", or only the number if abi.h has no name for it.
std::string describe(CUresult result);
// Returns whether a context that returned this error is unusable (cuda.h: "the process must be
// terminated and relaunched") or destroyed.
bool is_sticky(CUresult result) noexcept;

}  // namespace warmserve::cuda
