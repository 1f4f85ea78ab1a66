// Helpers for the tests that call the simulated driver directly.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "simcuda/functions.h"
#include "simcuda/simcuda.h"

namespace simcuda_test {

using namespace warmserve::simcuda;

constexpr std::size_t kGranule = 2 << 20;

#define OK(...) CHECK((__VA_ARGS__) == warmserve::cuda::CUDA_SUCCESS)
#define FAILS(error, ...) CHECK((__VA_ARGS__) == warmserve::cuda::CUDA_ERROR_##error)

// Makes a fresh driver with a current primary context.
inline CUcontext begin(const std::string& options = "") {
  CHECK(simcuda_reset(("memory=67108864\n" + options).c_str()) == 0);
  OK(cuInit(0));
  CUcontext context = nullptr;
  OK(cuDevicePrimaryCtxRetain(&context, 0));
  OK(cuCtxSetCurrent(context));
  return context;
}

inline CUmemAllocationProp prop() {
  CUmemAllocationProp made{};
  made.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  made.location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
  return made;
}

inline CUmemGenericAllocationHandle create(std::size_t bytes = kGranule) {
  CUmemGenericAllocationHandle handle = 0;
  const CUmemAllocationProp wanted = prop();
  OK(cuMemCreate(&handle, bytes, &wanted, 0));
  return handle;
}

inline CUdeviceptr reserve(std::size_t bytes = kGranule) {
  CUdeviceptr address = 0;
  OK(cuMemAddressReserve(&address, bytes, 0, 0, 0));
  return address;
}

inline CUresult set_access(CUdeviceptr address, std::size_t bytes,
                           CUmemAccess_flags flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
  const CUmemAccessDesc desc{{CU_MEM_LOCATION_TYPE_DEVICE, 0}, flags};
  return cuMemSetAccess(address, bytes, &desc, 1);
}

inline void map(CUdeviceptr address, CUmemGenericAllocationHandle handle,
                std::size_t bytes = kGranule) {
  OK(cuMemMap(address, bytes, 0, handle, 0));
  OK(set_access(address, bytes));
}

// Reserves addresses and maps memory there. Unmapping it frees the memory.
inline CUdeviceptr mapped(std::size_t bytes = kGranule) {
  const CUdeviceptr address = reserve(bytes);
  const auto handle = create(bytes);
  map(address, handle, bytes);
  OK(cuMemRelease(handle));
  return address;
}

inline CUstream stream(unsigned flags = CU_STREAM_NON_BLOCKING) {
  CUstream made = nullptr;
  OK(cuStreamCreate(&made, flags));
  return made;
}

inline CUevent event(unsigned flags = CU_EVENT_DISABLE_TIMING) {
  CUevent made = nullptr;
  OK(cuEventCreate(&made, flags));
  return made;
}

inline unsigned char* pinned(std::size_t bytes, unsigned char value = 0) {
  void* made = nullptr;
  OK(cuMemHostAlloc(&made, bytes, 0));
  std::memset(made, value, bytes);
  return static_cast<unsigned char*>(made);
}

inline std::vector<unsigned char> peek(CUdeviceptr address, std::size_t bytes) {
  std::vector<unsigned char> content(bytes);
  CHECK(simcuda_peek(address, content.data(), bytes) == 0);
  return content;
}
inline bool holds(CUdeviceptr address, std::size_t bytes, unsigned char value) {
  return peek(address, bytes) == std::vector<unsigned char>(bytes, value);
}

inline std::string report() {
  char* const text = simcuda_report();
  const std::string made = text;
  simcuda_free(text);
  return made;
}

// Returns the number of violations of a kind, or of all kinds for "".
inline int violations(const std::string& kind = "") {
  const std::string text = report(), wanted = "{\"kind\": \"" + kind;
  int count = 0;
  for (auto at = text.find(wanted); at != std::string::npos; at = text.find(wanted, at + 1))
    ++count;
  return count;
}

}  // namespace simcuda_test
