// The set of an arena's free granules. Bookkeeping only; not thread-safe.
#pragma once

#include <span>
#include <vector>

#include "base/types.h"

namespace warmserve {

class GranulePool {
 public:
  GranulePool() = default;
  // No granule is free at first. Allocates all memory that the pool will need.
  explicit GranulePool(std::uint32_t capacity);

  std::uint32_t free_count() const noexcept { return count_; }
  bool is_free(GranuleId id) const noexcept { return nodes_[leaves_ + id].longest == 1; }

  // Takes `count` free granules and returns them in ascending order. Chooses the first run of
  // adjacent ids that is long enough, else the longest runs, because adjacent granules become one
  // mapping.
  // O((count + runs) log capacity).
  // Precondition: count <= free_count().
  std::vector<GranuleId> take(std::uint32_t count);
  // Takes these granules.
  // Precondition: all are free.
  void take(std::span<const GranuleId> ids) noexcept;
  // Makes granules free.
  // Precondition: none of them is free.
  void give(std::span<const GranuleId> ids) noexcept;

 private:
  // A node of a binary tree over the granules: the lengths of the free runs at the beginning and at
  // the end of its range, and of its longest free run. Node i has the children 2 i and 2 i + 1.
  struct Node {
    std::uint32_t prefix = 0, suffix = 0, longest = 0;
  };
  void set(GranuleId id, bool free) noexcept;
  GranuleId find_run(std::uint32_t length) const noexcept;

  std::uint64_t leaves_ = 0;
  std::vector<Node> nodes_;
  std::uint32_t count_ = 0;
};

}  // namespace warmserve
