// So many bytes a second, at most.
#pragma once

#include <algorithm>

#include "base/types.h"

namespace warmserve {

// Under the owner's lock.
class Pace {
 public:
  // 0: no limit.
  explicit Pace(std::uint64_t bytes_per_second) : rate_(static_cast<double>(bytes_per_second)) {}

  // When so many more bytes may have arrived, if they begin to move now; or, for whoever was a
  // little late after the last ones, if they had begun at once.
  Deadline take(std::uint64_t bytes) {
    if (rate_ == 0) return Deadline::min();
    const std::chrono::duration<double> takes(static_cast<double>(bytes) / rate_);
    busy_until_ =
        std::max(busy_until_, Clock::now()) + std::chrono::duration_cast<Clock::duration>(takes);
    return busy_until_;
  }

 private:
  static constexpr auto kLate = std::chrono::milliseconds(1);
  const double rate_;
  Deadline busy_until_ = Deadline::min();
};

}  // namespace warmserve
