// One device's memory: its granules, and the budget that limits them.
//
// The arena creates all granules at construction, so that a swap creates none. Trimming returns
// free granules to the driver; later work creates them again, up to the budget.
//
// The functions under "Bookkeeping" are called under the runtime's lock and touch no device. The
// other functions are called without it and may block. A granule that was taken belongs to the
// caller until it is given back.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "memory/granule_pool.h"
#include "memory/vmm.h"

namespace warmserve {

class Arena {
 public:
  struct Options {
    std::uint64_t bytes = 0;
    std::uint64_t granule_bytes = 0;
    std::uint64_t headroom_bytes = 0;  // device memory that the arena leaves free
    bool poison = false;
    bool imported = false;  // the granules are another process's; import() fills the slots
  };
  // Throws invalid_argument; out_of_device_memory, with the bytes available and requested, if the
  // device has too little memory. After a throw no granule is left. Blocks.
  Arena(DevicePtr device, const Options& options);

  const DevicePtr& device() const noexcept { return device_; }
  std::uint64_t granule_bytes() const noexcept { return granule_bytes_; }
  std::uint32_t capacity() const noexcept { return capacity_; }
  std::uint64_t budget() const noexcept { return capacity_ * granule_bytes_; }
  std::uint64_t headroom() const noexcept { return headroom_bytes_; }
  std::uint64_t granules_of(std::uint64_t bytes) const noexcept {
    return ceil_div(bytes, granule_bytes_);
  }

  // Bookkeeping.
  std::uint32_t free_count() const noexcept { return pool_.free_count(); }
  std::uint32_t trimmed_count() const noexcept { return trimmed_.free_count(); }
  bool is_free(GranuleId id) const noexcept { return pool_.is_free(id); }
  std::vector<GranuleId> take(std::uint32_t count) { return pool_.take(count); }
  void give(std::span<const GranuleId> ids) noexcept { pool_.give(ids); }
  // Takes ids that have no granule. They belong to the caller, who creates or returns them.
  std::vector<GranuleId> claim_trimmed(std::uint32_t count) { return trimmed_.take(count); }
  void return_trimmed(std::span<const GranuleId> ids) noexcept { trimmed_.give(ids); }
  void check_invariants() const;

  // Creates the granule of a claimed id. Throws out_of_device_memory, also if it would cut into the
  // headroom. Strong. Blocks.
  void create(GranuleId id);
  // Imports the granule of a taken id from another process. Strong. Precondition:
  // Options::imported, and the id has no granule.
  void import(GranuleId id, const SharedGranule& shared);
  // Releases taken granules to the driver, in order, and returns how many. Stops at the first one
  // that the driver refuses to release, which stays usable. Blocks.
  std::size_t destroy(std::span<const GranuleId> ids) noexcept;

  // Releases the window and the poison granule.
  // Precondition: all granules are destroyed.
  void release() noexcept;

  ReservationPtr reserve(std::uint64_t bytes) const {
    return std::make_shared<Reservation>(device_, bytes);
  }
  ExportedGranule exported(GranuleId id) const { return slots_[id].granule->exported(); }
  Handle handle(GranuleId id) const noexcept { return slots_[id].granule->handle(); }
  // Returns the address at which the CPU writes a granule; null if it has no access, and then
  // copies to window() fill the granule.
  std::byte* host_view(GranuleId id) const noexcept { return slots_[id].granule->host_view(); }
  Address window(GranuleId id) const noexcept { return window_->address() + id * granule_bytes_; }
  bool filled_by_host() const noexcept { return device_->facts().host_view; }
  // Returns a granule of all ones (a NaN in every float format), which is mapped at evicted
  // addresses; Handle::none without Options::poison.
  Handle poison() const noexcept { return poison_ ? poison_->handle() : Handle::none; }

 private:
  struct Slot {
    std::optional<Granule> granule;
    std::optional<Mapping> window;  // unmapped before the granule is destroyed
  };
  void require_memory(std::uint64_t bytes, const std::string& what) const;
  void make(GranuleId id);
  void make_all();
  void give_all();
  static void drop_window(Slot& slot) noexcept;
  void make_poison();

  DevicePtr device_;
  const std::uint64_t granule_bytes_, headroom_bytes_;
  const std::uint32_t capacity_;
  const bool imported_;
  GranulePool pool_;
  GranulePool trimmed_;  // ids without a granule
  // Maps every granule, writable, at index x granule_bytes. The models' own addresses are
  // read-only, so on a discrete device copies fill granules through this window. Null if the CPU
  // can access granules.
  ReservationPtr window_;
  // Fixed size; only the owner of an id touches its slot.
  std::vector<Slot> slots_;
  std::optional<Granule> poison_;
};

}  // namespace warmserve
