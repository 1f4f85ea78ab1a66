#include "memory/staging.h"

#include <algorithm>

namespace warmserve {

StagingPool::StagingPool(DevicePtr device, std::uint64_t bytes, std::uint64_t chunk_bytes)
    : device_(std::move(device)),
      chunk_bytes_(chunk_bytes),
      count_(chunk_bytes ? bytes / chunk_bytes : 0) {
  for (const std::uint64_t size : {bytes, chunk_bytes})
    if (size > kMostBytes)
      throw Error(ErrorKind::invalid_argument,
                  "sizes must be below 2^63 bytes, got " + std::to_string(size));
  if (chunk_bytes == 0 || chunk_bytes % (4 * kKiB))
    throw Error(ErrorKind::invalid_argument,
                "a chunk of " + format_bytes(chunk_bytes) + " is not a positive multiple of 4 KiB");
  if (count_ == 0)
    throw Error(ErrorKind::invalid_argument, "staging of " + format_bytes(bytes) +
                                                 " is smaller than a chunk of " +
                                                 format_bytes(chunk_bytes));
}

std::size_t StagingPool::available() const {
  const std::lock_guard lock(mutex_);
  return free_.size() + count_ - regions_.size() - pinning_;
}

std::uint64_t StagingPool::pinned_bytes() const {
  const std::lock_guard lock(mutex_);
  return regions_.size() * chunk_bytes_;
}

void StagingPool::release() {
  const std::lock_guard lock(mutex_);
  if (free_.size() < regions_.size()) return;
  free_.clear();
  regions_.clear();
}

// Returns a free chunk, or pins a new one below the bound; null otherwise. Drops the lock to pin.
std::byte* StagingPool::take_free(std::unique_lock<std::mutex>& lock) {
  if (!free_.empty()) {
    std::byte* data = free_.back();
    free_.pop_back();
    return data;
  }
  if (regions_.size() + pinning_ == count_) return nullptr;
  const std::size_t most = regions_.size() + pinning_ + 1;
  if (free_.capacity() < most) {  // so that give_back() never allocates
    free_.reserve(2 * most);
    regions_.reserve(2 * most);
  }
  ++pinning_;
  lock.unlock();
  std::unique_ptr<PinnedRegion> region;
  try {
    region = std::make_unique<PinnedRegion>(device_, chunk_bytes_);
  } catch (...) {
    lock.lock();
    --pinning_;
    freed_.notify_all();  // another waiter may have counted on this one
    throw;
  }
  lock.lock();
  --pinning_;
  regions_.push_back(std::move(region));
  return regions_.back()->data();
}

void StagingPool::give_back(std::byte* data) noexcept {
  const std::lock_guard lock(mutex_);
  free_.push_back(data);
  freed_.notify_all();
}

std::optional<StagingPool::Chunk> StagingPool::try_acquire() {
  std::unique_lock lock(mutex_);
  if (!waiters_.empty()) return std::nullopt;
  std::byte* data = take_free(lock);
  if (!data) return std::nullopt;
  return Chunk(this, data);
}

StagingPool::Chunk StagingPool::acquire(Deadline deadline, const Poll& poll) {
  std::unique_lock lock(mutex_);
  waiters_.push_back(&lock);
  const auto leave = [&] {
    waiters_.erase(std::find(waiters_.begin(), waiters_.end(), &lock));
    freed_.notify_all();  // the next in line may be served
  };
  try {
    for (;;) {
      if (waiters_.front() == &lock) {
        if (std::byte* data = take_free(lock)) {
          leave();
          return Chunk(this, data);
        }
      }
      if (Clock::now() >= deadline)
        throw Error(ErrorKind::staging_timeout,
                    "no staging chunk of " + format_bytes(chunk_bytes_) +
                        " became free in time; all " + std::to_string(count_) + " are in use");
      freed_.wait_until(lock, std::min(deadline, Clock::now() + kPollInterval));
      if (poll) {
        lock.unlock();
        poll();
        lock.lock();
      }
    }
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    leave();
    throw;
  }
}

}  // namespace warmserve
