// Wakes one event loop for many waiters, through one descriptor.
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "base/eventfd.h"

namespace warmserve {

// Any thread may call anything; its lock is a leaf.
class Waker {
 public:
  Waker() { descriptor_ = eventfd_.descriptor(); }  // throws general

  // Readable while there are tokens to take; owned by this.
  int fileno() const noexcept { return descriptor_; }
  void wake(std::uint64_t token) {
    const std::lock_guard lock(mutex_);
    woken_.push_back(token);
    eventfd_.signal();
  }
  // The tokens woken since the last call.
  std::vector<std::uint64_t> take() {
    const std::lock_guard lock(mutex_);
    eventfd_.clear();
    return std::exchange(woken_, {});
  }

 private:
  std::mutex mutex_;
  EventFd eventfd_;
  int descriptor_ = -1;
  std::vector<std::uint64_t> woken_;
};

}  // namespace warmserve
