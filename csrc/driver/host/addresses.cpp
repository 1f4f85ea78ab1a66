#include "driver/host/addresses.h"

#include <iterator>

namespace warmserve {

bool HostAddresses::free_of_mappings(Address address, std::uint64_t bytes) const {
  const auto next = mapped_.lower_bound(address);
  if (next != mapped_.end() && next->first - address < bytes) return false;
  return next == mapped_.begin() ||
         std::prev(next)->first + std::prev(next)->second.bytes <= address;
}

bool HostAddresses::can_free(Address address, std::uint64_t bytes) const {
  const auto found = reservations_.find(address);
  return found != reservations_.end() && found->second == bytes && free_of_mappings(address, bytes);
}

bool HostAddresses::can_map(Address address, std::uint64_t bytes) const {
  if (bytes == 0 || address % granularity_ || bytes % granularity_) return false;
  auto reservation = reservations_.upper_bound(address);
  if (reservation == reservations_.begin()) return false;
  --reservation;
  const std::uint64_t offset = address - reservation->first;
  return offset < reservation->second && bytes <= reservation->second - offset &&
         free_of_mappings(address, bytes);
}

void HostAddresses::map(Address address, std::span<const Mapped> granules) {
  const auto next = mapped_.lower_bound(address);
  for (const Mapped& granule : granules) {
    mapped_.emplace_hint(next, address, granule);
    address += granule.bytes;
    runs_ += granule.begins_run;
  }
}

std::optional<HostAddresses::Range> HostAddresses::whole(Address address, std::uint64_t bytes) {
  const auto first = mapped_.find(address);
  auto last = first;
  std::uint64_t covered = 0;
  while (last != mapped_.end() && last->first - address == covered && covered < bytes) {
    covered += last->second.bytes;
    ++last;
  }
  if (bytes == 0 || covered != bytes) return std::nullopt;
  return Range(first, last);
}

void HostAddresses::unmap(Range range) {
  const auto [first, last] = range;
  const Address end = std::prev(last)->first + std::prev(last)->second.bytes;
  for (auto mapping = first; mapping != last; ++mapping) runs_ -= mapping->second.begins_run;
  // If the range cuts a run, the rest of that run becomes a run of its own.
  if (last != mapped_.end() && last->first == end && !last->second.begins_run) {
    last->second.begins_run = true;
    ++runs_;
  }
  mapped_.erase(first, last);
}

}  // namespace warmserve
