// Pinned host memory that stays pinned: slabs, cut into units that are lent.
//
// To unregister host memory, CUDA waits for all work of the context, so a slab is unpinned only by
// release(). A thread pins the slabs one after the other, up to the budget; units of a pinned slab
// can be lent while it pins the next one. If a slab cannot be pinned, the pool keeps the slabs that
// it has. The pool has its own lock, a leaf.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "memory/vmm.h"

namespace warmserve {

class HostSlabs {
 public:
  static constexpr std::uint64_t kUnitBytes = 2 * kMiB;

  // Units on loan. The holder waits for every copy that uses them before destroying this.
  class Units {
   public:
    Units(Units&& other) noexcept
        : pool_(std::exchange(other.pool_, nullptr)), blocks_(std::move(other.blocks_)) {}
    Units& operator=(Units&&) = delete;
    ~Units() {
      if (pool_) pool_->give_back(blocks_);
    }
    const std::vector<std::byte*>& blocks() const noexcept { return blocks_; }

   private:
    friend class HostSlabs;
    Units(HostSlabs* pool, std::vector<std::byte*> blocks) noexcept
        : pool_(pool), blocks_(std::move(blocks)) {}
    HostSlabs* pool_;
    std::vector<std::byte*> blocks_;
  };

  struct State {
    std::uint64_t budget_bytes = 0, pinned_bytes = 0, lent_bytes = 0;
    std::string error;  // why fewer bytes than the budget are pinned; empty: nothing failed
  };

  // Pins nothing if `bytes` is 0. Throws invalid_argument for other sizes below a unit, and for
  // sizes above the memory that the machine and its control groups have left. Without `thread` it
  // pins all slabs before it returns; blocks then.
  HostSlabs(DevicePtr device, std::uint64_t bytes, bool thread);
  ~HostSlabs() { stop(); }
  HostSlabs(const HostSlabs&) = delete;

  bool enabled() const noexcept { return budget_ > 0; }
  State state() const;
  bool growing() const;  // the thread still pins slabs
  std::size_t free_units() const;
  // Lends units, or none if fewer are free. Adjacent units are lent together if possible.
  std::optional<Units> take(std::size_t count);
  // Ends the thread after the slab that it is pinning. Idempotent. Blocks.
  void stop();
  // Unpins all slabs. Preconditions: stop() was called, and no unit is lent.
  void release();

 private:
  void pin_all();
  bool pin_next();
  void give_back(const std::vector<std::byte*>& blocks) noexcept;

  const DevicePtr device_;
  const std::uint64_t budget_;

  mutable std::mutex mutex_;  // guards all below
  std::vector<std::unique_ptr<PinnedRegion>> slabs_;
  std::uint64_t pinned_ = 0;
  std::set<std::byte*> free_;  // in the order of their addresses
  std::string error_;
  bool stopping_ = false;

  std::thread thread_;  // last: it uses all members above
};

}  // namespace warmserve
