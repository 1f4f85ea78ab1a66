// Granules of a CUDA device: of what kind they are made, and on devices that share the CPU's memory
// where the CPU reaches them.
#pragma once

#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "driver/cuda/context.h"

namespace warmserve::cuda {

class Granules {
 public:
  // Throws general where the driver does not say its granularity.
  explicit Granules(Context& context);
  ~Granules();

  std::uint64_t granularity() const noexcept { return granularity_; }
  // The device has no memory of its own: granules are of the CPU's, and need no staging.
  bool integrated() const noexcept { return kind_.location.type == CU_MEM_LOCATION_TYPE_HOST_NUMA; }

  // As the Driver's primitives of these names.
  Status create(std::uint64_t bytes, Handle* out);
  Status release(Handle handle);
  std::byte* host_view(Handle handle) noexcept;
  std::optional<std::uint64_t> bytes(Handle handle);

 private:
  struct Granule {
    std::uint64_t bytes;
    CUdeviceptr view;  // where the CPU and the device both reach it; 0 unless integrated
  };
  void choose_kind();
  Status show(CUmemGenericAllocationHandle handle, std::uint64_t bytes, CUdeviceptr* view);
  void hide(CUdeviceptr view, std::uint64_t bytes, bool mapped);
  void drop(CUmemGenericAllocationHandle handle);
  void settle();

  Context& context_;
  CUmemAllocationProp kind_{};
  std::uint64_t granularity_ = 0;

  struct Hidden {
    CUdeviceptr view;
    std::uint64_t bytes;
    bool mapped;
  };
  std::mutex mutex_;  // a leaf; not held over calls
  std::unordered_map<std::uint64_t, Granule> granules_;
  // What the driver did not take back yet.
  std::vector<Hidden> kept_views_;
  std::vector<CUmemGenericAllocationHandle> kept_handles_;
};

}  // namespace warmserve::cuda
