// Bounded pinned host memory, cut into chunks that are lent in the order they are asked for.
//
// Never more than the bytes it was made with, exactly that much once all of it was needed, all
// returned with the pool. A lock of its own, a leaf.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "memory/vmm.h"

namespace warmserve {

class StagingPool {
 public:
  // A chunk on loan. Its holder has waited for every copy that uses it before it lets go.
  class Chunk {
   public:
    Chunk(Chunk&& other) noexcept
        : pool_(std::exchange(other.pool_, nullptr)), data_(other.data_) {}
    Chunk& operator=(Chunk&&) = delete;
    ~Chunk() {
      if (pool_) pool_->give_back(data_);
    }
    std::byte* data() const noexcept { return data_; }

   private:
    friend class StagingPool;
    Chunk(StagingPool* pool, std::byte* data) noexcept : pool_(pool), data_(data) {}
    StagingPool* pool_;
    std::byte* data_;
  };

  // Throws invalid_argument when `bytes` holds no chunk. Allocates nothing yet.
  StagingPool(DevicePtr device, std::uint64_t bytes, std::uint64_t chunk_bytes);

  std::uint64_t chunk_bytes() const noexcept { return chunk_bytes_; }
  // Chunks that could be lent now.
  std::size_t available() const;
  std::uint64_t pinned_bytes() const;
  // Unpins everything, if no chunk is lent.
  void release();

  // A chunk if one is free and nobody waits for it.
  std::optional<Chunk> try_acquire();
  // Blocks, first come first served. Throws staging_timeout at the deadline, or what poll throws.
  Chunk acquire(Deadline deadline, const Poll& poll);

 private:
  std::byte* take_free(std::unique_lock<std::mutex>& lock);
  void give_back(std::byte* data) noexcept;

  const DevicePtr device_;
  const std::uint64_t chunk_bytes_;
  const std::size_t count_;

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable freed_;
  std::vector<std::unique_ptr<PinnedRegion>> regions_;  // a chunk each, pinned when first needed
  std::size_t pinning_ = 0;                             // regions being made without the lock
  std::vector<std::byte*> free_;
  std::deque<const void*> waiters_;  // by the address of something in the waiter's frame
};

}  // namespace warmserve
