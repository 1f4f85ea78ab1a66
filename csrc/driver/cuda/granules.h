// Granules of a CUDA device: the kind of memory they are made of, and, on devices that share the
// CPU's memory, the address at which the CPU accesses each.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "driver/cuda/context.h"

namespace warmserve::cuda {

class Granules {
 public:
  // Throws general if the driver does not report the granularity.
  explicit Granules(Context& context);
  ~Granules();

  std::uint64_t granularity() const noexcept { return granularity_; }
  // Returns whether granules are CPU memory, which the device shares. They then need no staging.
  bool integrated() const noexcept { return kind_.location.type == CU_MEM_LOCATION_TYPE_HOST_NUMA; }

  // The Driver's primitives granule_create, granule_release, ...
  Status create(std::uint64_t bytes, Handle* out);
  Status release(Handle handle);
  Status share(Handle handle, SharedGranule* out);
  Status import(const SharedGranule& shared, std::uint64_t bytes, Handle* out);
  std::byte* host_view(Handle handle) noexcept;
  // Returns a granule's size; nullopt for an unknown handle.
  std::optional<std::uint64_t> bytes(Handle handle);
  // Records where imported granules are mapped. CUDA would let this process write them.
  void mapped(Address address, std::span<const Handle> handles);
  void unmapped(Address address, std::uint64_t bytes);
  // Returns whether an imported granule is mapped in the range.
  bool read_only(Address address, std::uint64_t bytes);

 private:
  struct Granule {
    std::uint64_t bytes;
    CUdeviceptr view;  // address for both the CPU and the device; 0 unless integrated
    bool imported;     // and then without a view
  };
  Status make(std::uint64_t bytes, CUmemGenericAllocationHandle* out);
  Status show(CUmemGenericAllocationHandle handle, std::uint64_t bytes, CUdeviceptr* view);
  void hide(CUdeviceptr view, std::uint64_t bytes, bool mapped);
  void drop(CUmemGenericAllocationHandle handle);
  void settle();

  Context& context_;
  std::uint64_t granularity_ = 0;

  struct Hidden {
    CUdeviceptr view;
    std::uint64_t bytes;
    bool mapped;
  };
  std::mutex mutex_;            // guards all below; a leaf; not held over driver calls
  CUmemAllocationProp kind_{};  // location: set at construction, read without the lock
  std::unordered_map<std::uint64_t, Granule> granules_;
  std::map<Address, std::uint64_t> read_only_;  // bytes of mapped imported granules
  // Views and handles that the driver has refused to free so far.
  std::vector<Hidden> kept_views_;
  std::vector<CUmemGenericAllocationHandle> kept_handles_;
};

}  // namespace warmserve::cuda
