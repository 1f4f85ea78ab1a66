// A limit of bytes per second.
#pragma once

#include <algorithm>

#include "base/types.h"

namespace warmserve {

// Used under the owner's lock.
class Pace {
 public:
  // `bytes_per_second`: 0 means no limit.
  explicit Pace(std::uint64_t bytes_per_second) : rate_(static_cast<double>(bytes_per_second)) {}

  // Returns the earliest time at which `bytes` more bytes may complete, and counts them.
  Deadline take(std::uint64_t bytes) {
    if (rate_ == 0) return Deadline::min();
    const std::chrono::duration<double> takes(static_cast<double>(bytes) / rate_);
    busy_until_ =
        std::max(busy_until_, Clock::now()) + std::chrono::duration_cast<Clock::duration>(takes);
    return busy_until_;
  }

 private:
  const double rate_;
  Deadline busy_until_ = Deadline::min();
};

}  // namespace warmserve
