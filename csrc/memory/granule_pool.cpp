#include "memory/granule_pool.h"

#include <algorithm>
#include <bit>

namespace warmserve {

GranulePool::GranulePool(std::uint32_t capacity)
    : leaves_(std::bit_ceil(std::uint64_t{capacity})), nodes_(2 * leaves_) {}

void GranulePool::set(GranuleId id, bool free) noexcept {
  std::uint64_t node = leaves_ + id;
  const std::uint32_t one = free;
  nodes_[node] = {one, one, one};
  for (std::uint64_t half = 1; node > 1; half *= 2) {
    node /= 2;
    const Node& left = nodes_[2 * node];
    const Node& right = nodes_[2 * node + 1];
    nodes_[node] = {left.prefix == half ? left.prefix + right.prefix : left.prefix,
                    right.suffix == half ? right.suffix + left.suffix : right.suffix,
                    std::max({left.longest, right.longest, left.suffix + right.prefix})};
  }
}

// Returns the begin of the first free run of at least this length.
// Precondition: such a run exists.
GranuleId GranulePool::find_run(std::uint32_t length) const noexcept {
  std::uint64_t node = 1, begin = 0;
  for (std::uint64_t half = leaves_ / 2; half > 0; half /= 2) {
    const Node& left = nodes_[2 * node];
    const Node& right = nodes_[2 * node + 1];
    node *= 2;
    if (left.longest >= length) continue;
    if (left.suffix + right.prefix >= length)
      return static_cast<GranuleId>(begin + half - left.suffix);
    ++node;
    begin += half;
  }
  return static_cast<GranuleId>(begin);
}

std::vector<GranuleId> GranulePool::take(std::uint32_t count) {
  std::vector<GranuleId> taken;
  taken.reserve(count);
  while (taken.size() < count) {
    const auto missing = count - static_cast<std::uint32_t>(taken.size());
    const std::uint32_t length = std::min(missing, nodes_[1].longest);
    const GranuleId first = find_run(length);
    for (std::uint32_t i = 0; i < length; ++i) {
      set(first + i, false);
      taken.push_back(first + i);
    }
  }
  std::sort(taken.begin(), taken.end());
  count_ -= count;
  return taken;
}

void GranulePool::take(std::span<const GranuleId> ids) noexcept {
  for (const GranuleId id : ids) set(id, false);
  count_ -= static_cast<std::uint32_t>(ids.size());
}

void GranulePool::give(std::span<const GranuleId> ids) noexcept {
  for (const GranuleId id : ids) set(id, true);
  count_ += static_cast<std::uint32_t>(ids.size());
}

}  // namespace warmserve
