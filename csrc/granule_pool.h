// Which granules of an arena are free. Bookkeeping only; not synchronised.
#pragma once

#include <span>
#include <vector>

#include "types.h"

namespace warmserve {

class GranulePool {
 public:
  explicit GranulePool(std::uint32_t capacity) : free_(capacity, false) {}

  std::uint32_t free_count() const noexcept { return count_; }
  bool is_free(GranuleId id) const noexcept { return free_[id]; }

  // Takes `count` free granules, in as few runs of neighbours as a first fit finds: neighbours
  // become one mapping. Ascending. Pre-condition: count <= free_count().
  std::vector<GranuleId> take(std::uint32_t count);
  // Pre-condition: none of them is free.
  void give(std::span<const GranuleId> ids) noexcept;

 private:
  struct Run {
    GranuleId first;
    std::uint32_t length;
  };
  std::vector<Run> runs() const;

  std::vector<bool> free_;
  std::uint32_t count_ = 0;
};

}  // namespace warmserve
