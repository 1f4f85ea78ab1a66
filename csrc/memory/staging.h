// Bounded pinned host memory, cut into chunks that are lent in the order of the requests.
//
// The pool pins chunks on demand, up to the bytes given at construction, and unpins all of them on
// destruction. It has its own lock, a leaf.
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
  // A chunk on loan. The holder waits for every copy that uses it before destroying this.
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

  // Throws invalid_argument if `chunk_bytes` is invalid or `bytes` is smaller than a chunk. Pins no
  // memory yet.
  StagingPool(DevicePtr device, std::uint64_t bytes, std::uint64_t chunk_bytes);

  std::uint64_t chunk_bytes() const noexcept { return chunk_bytes_; }
  std::uint64_t bytes() const noexcept { return count_ * chunk_bytes_; }  // the most it pins
  // Returns the number of chunks that can be lent now.
  std::size_t available() const;
  std::uint64_t pinned_bytes() const;
  // Unpins all memory unless a chunk is lent.
  void release();

  // Returns a chunk if one can be lent and no caller waits for one. Does not wait for chunks.
  std::optional<Chunk> try_acquire();
  // Waits for a chunk, in the order of the calls. Blocks. Throws staging_timeout at the deadline,
  // or what poll throws.
  Chunk acquire(Deadline deadline, const Poll& poll);

 private:
  std::byte* take_free(std::unique_lock<std::mutex>& lock);
  void give_back(std::byte* data) noexcept;

  const DevicePtr device_;
  const std::uint64_t chunk_bytes_;
  const std::size_t count_;

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable freed_;
  std::vector<std::unique_ptr<PinnedRegion>> regions_;  // a chunk each, pinned on demand
  std::size_t pinning_ = 0;                             // regions being pinned without the lock
  std::vector<std::byte*> free_;
  std::deque<const void*> waiters_;  // each waiter by the address of its lock
};

}  // namespace warmserve
