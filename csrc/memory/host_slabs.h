// Pinned host memory that stays pinned: slabs, cut into units that are lent.
//
// To unregister host memory, CUDA waits for all work of the context, so a slab is unpinned only by
// release(). A thread pins the slabs one after the other, up to the budget; units of a pinned slab
// can be lent while it pins the next one. If a slab cannot be pinned, the pool keeps the slabs that
// it has. The pool has its own lock, a leaf.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "memory/vmm.h"

namespace warmserve {

class HostSlabs {
  using Free = std::map<std::byte*, std::uint32_t>;  // units by address, with their slab's number

 public:
  static constexpr std::uint64_t kUnitBytes = 2 * kMiB;

  // Units on loan. The holder waits for every copy that uses them before destroying this.
  class Units {
   public:
    Units(Units&& other) noexcept
        : pool_(std::exchange(other.pool_, nullptr)),
          blocks_(std::move(other.blocks_)),
          slabs_(std::move(other.slabs_)),
          nodes_(std::move(other.nodes_)) {}
    Units& operator=(Units&&) = delete;
    ~Units() {
      if (pool_) pool_->give_back(nodes_);
    }
    const std::vector<std::byte*>& blocks() const noexcept { return blocks_; }
    // The number of each block's slab. A copy may not cross from one slab to another, also if their
    // addresses are adjacent.
    const std::vector<std::uint32_t>& slabs() const noexcept { return slabs_; }

   private:
    friend class HostSlabs;
    explicit Units(HostSlabs* pool) noexcept : pool_(pool) {}
    HostSlabs* pool_;
    std::vector<std::byte*> blocks_;
    std::vector<std::uint32_t> slabs_;
    std::vector<Free::node_type> nodes_;  // so that giving back allocates nothing
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
  void give_back(std::vector<Free::node_type>& nodes) noexcept;

  const DevicePtr device_;
  const std::uint64_t budget_;

  mutable std::mutex mutex_;  // guards all below
  std::vector<std::unique_ptr<PinnedRegion>> slabs_;
  std::uint64_t pinned_ = 0;
  Free free_;
  std::string error_;
  bool stopping_ = false;

  std::thread thread_;  // last: it uses all members above
};

}  // namespace warmserve
