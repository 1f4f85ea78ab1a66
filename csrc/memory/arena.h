// One device's memory: its granules, and the budget that limits them.
//
// The arena creates all granules at construction, so that a swap creates none. Trimming returns
// free granules to the driver; later work creates them again, up to the budget.
//
// The functions under "Bookkeeping" are called under the runtime's lock and touch no device. The
// other functions are called without it and may block. A granule that was taken belongs to the
// caller until it is given back.
//
// An arena with a record of its contents (contents.h) also knows which free granules contain a
// layer. It hands out other granules first.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "memory/contents.h"
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
  std::uint32_t free_count() const noexcept { return pool_.free_count() + filled_.free_count(); }
  std::uint32_t trimmed_count() const noexcept { return trimmed_.free_count(); }
  bool is_free(GranuleId id) const noexcept { return pool_.is_free(id) || is_filled(id); }
  // Takes free granules, recorded ones last. They stay recorded until forget().
  std::vector<GranuleId> take(std::uint32_t count);
  void give(std::span<const GranuleId> ids) noexcept;
  // Takes ids that have no granule. They belong to the caller, who creates or returns them.
  std::vector<GranuleId> claim_trimmed(std::uint32_t count) { return trimmed_.take(count); }
  void return_trimmed(std::span<const GranuleId> ids) noexcept { trimmed_.give(ids); }
  void check_invariants() const;

  // Bookkeeping of contents. Without a record nothing is remembered.

  // A random number that names the arena for as long as its record exists; 0 without a record.
  std::uint64_t id() const noexcept { return contents_ ? contents_->arena_id() : 0; }
  // Records that granules contain a layer.
  void remember(const ContentKey& key, std::span<const GranuleId> ids) {
    if (contents_) contents_->record(key, ids);
  }
  // Returns the granules that contain a layer, used or not; null if there are none.
  const std::vector<GranuleId>* recorded(const ContentKey& key) const {
    return contents_ && key ? contents_->find(key) : nullptr;
  }
  // Ends the records of taken granules. Must be called before they are overwritten.
  void forget(std::span<const GranuleId> ids);
  // Returns the granules that contain a layer and that no layer uses, free or set aside; empty if
  // there are none.
  std::vector<GranuleId> remembered(const ContentKey& key) const;
  // Takes such granules.
  void take_remembered(std::span<const GranuleId> ids) noexcept;
  // Sets free granules aside, because clients of an earlier process may read them. They can only be
  // taken as remembered ones.
  void set_aside(std::span<const GranuleId> ids);
  // Frees those of the granules that are set aside.
  void end_set_aside(std::span<const GranuleId> ids);
  std::uint32_t aside_count() const noexcept { return aside_.free_count(); }
  bool is_aside(GranuleId id) const noexcept { return contents_ && aside_.is_free(id); }

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
  bool is_filled(GranuleId id) const noexcept { return contents_ && filled_.is_free(id); }
  static void drop_window(Slot& slot) noexcept;
  void make_poison();

  DevicePtr device_;
  const std::uint64_t granule_bytes_, headroom_bytes_;
  const std::uint32_t capacity_;
  const bool imported_;
  std::unique_ptr<Contents> contents_;
  GranulePool pool_;     // free
  GranulePool filled_;   // free, and recorded to contain a layer
  GranulePool aside_;    // set aside
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
