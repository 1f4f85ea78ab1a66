#include "driver/cuda/library.h"

#include <dlfcn.h>

#include <thread>

#include "base/error.h"

namespace warmserve::cuda {
namespace {

constexpr int kLeastVersion = 12000;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Error unusable(const std::string& why) { return Error(ErrorKind::general, why); }

void require_started(const char* function, CUresult result) {
  if (result == CUDA_SUCCESS) return;
  if (result == CUDA_ERROR_NO_DEVICE)
    throw unusable(
        "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use the device "
        "'host'");
  std::string why =
      std::string("the CUDA driver does not start: ") + function + " returned " + describe(result);
  if (result == CUDA_ERROR_NOT_INITIALIZED)
    why += ". A forked child cannot use it if its parent does: start workers by spawn";
  throw unusable(why);
}

}  // namespace

Library::Library(const std::string& name) {
  void* library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* why = ::dlerror();
    throw unusable("no CUDA driver (" + std::string(why ? why : name) +
                   "): install NVIDIA's driver, 525 or newer, or use the device 'host'");
  }
  const auto version_of =
      reinterpret_cast<CUresult (*)(int*)>(::dlsym(library, "cuDriverGetVersion"));
  if (!version_of) throw unusable(name + " is not a CUDA driver: it has no cuDriverGetVersion");
  require_started("cuDriverGetVersion", version_of(&version));
  if (version < kLeastVersion)
    throw unusable("the CUDA driver " + name + " has version " + version_text(version) +
                   ": update NVIDIA's driver to 525 or newer (CUDA " + version_text(kLeastVersion) +
                   ")");
#define X(function, parameters)                                                     \
  function = reinterpret_cast<CUresult(*) parameters>(::dlsym(library, #function)); \
  if (!function)                                                                    \
    throw unusable(name + " (CUDA " + version_text(version) + ") lacks " #function ": update it");
  WARMSERVE_CUDA_FUNCTIONS(X)
#undef X
  simcuda_host_read =
      reinterpret_cast<decltype(simcuda_host_read)>(::dlsym(library, "simcuda_host_read"));
  simcuda_sleep = reinterpret_cast<decltype(simcuda_sleep)>(::dlsym(library, "simcuda_sleep"));
  require_started("cuInit", cuInit(0));
}

void Library::sleep(std::chrono::nanoseconds time) const {
  if (simcuda_sleep)
    simcuda_sleep(static_cast<unsigned long long>(time.count()));
  else
    std::this_thread::sleep_for(time);
}

std::string describe(CUresult result) {
  const std::string number = std::to_string(static_cast<int>(result));
  switch (result) {
#define X(name, value) \
  case CUDA_##name: return "CUDA_" #name " (" + number + ")";
    WARMSERVE_CUDA_ERRORS(X)
#undef X
  }
  return "CUDA error " + number;
}

bool is_sticky(CUresult result) noexcept {
  switch (result) {
    case CUDA_ERROR_DEINITIALIZED:
    case CUDA_ERROR_INVALID_CONTEXT:
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_CONTAINED:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_TENSOR_MEMORY_LEAK:
    case CUDA_ERROR_EXTERNAL_DEVICE: return true;
    default: return false;
  }
}

}  // namespace warmserve::cuda
