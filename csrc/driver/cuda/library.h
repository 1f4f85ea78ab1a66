// libcuda, opened at run time: every function that this project calls, by its exported name.
#pragma once

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
};

// Returns "CUDA_ERROR_ILLEGAL_ADDRESS (700)", or only the number if abi.h has no name for it.
std::string describe(CUresult result);
// Returns whether a context that returned this error is unusable (cuda.h: "the process must be
// terminated and relaunched") or destroyed.
bool is_sticky(CUresult result) noexcept;

}  // namespace warmserve::cuda
