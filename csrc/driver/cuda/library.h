// libcuda, opened at run time: every function this project calls, by its exact exported name.
#pragma once

#include <string>

#include "driver/cuda/abi.h"

namespace warmserve::cuda {

// Stays open as long as the process: streams of others may still run through it.
struct Library {
  // Throws Error(general) with a sentence that says what to do: no such library, not a CUDA driver,
  // one before 12.0, or one that cannot start.
  explicit Library(const std::string& name);

  int version = 0;  // as cuDriverGetVersion: 12040 is 12.4
#define X(name, parameters) CUresult(*name) parameters = nullptr;
  WARMSERVE_CUDA_FUNCTIONS(X)
#undef X
};

// "CUDA_ERROR_ILLEGAL_ADDRESS (700)"; the number alone for one that is not in abi.h.
std::string describe(CUresult result);
// Whether a context that returned it can do no more work (cuda.h: "the process must be terminated
// and relaunched"), or is no more.
bool is_sticky(CUresult result) noexcept;

}  // namespace warmserve::cuda
