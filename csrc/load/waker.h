// Wakes one event loop on behalf of many waiters through one descriptor.
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "base/eventfd.h"

namespace warmserve {

// Thread-safe. No other lock is taken under its lock.
class Waker {
 public:
  Waker() { descriptor_ = eventfd_.descriptor(); }  // throws general

  // A descriptor, owned by the waker, that is readable while take() would return tokens.
  int fileno() const noexcept { return descriptor_; }
  void wake(std::uint64_t token) {
    const std::lock_guard lock(mutex_);
    woken_.push_back(token);
    eventfd_.signal();
  }
  // Returns the tokens woken since the last call.
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
