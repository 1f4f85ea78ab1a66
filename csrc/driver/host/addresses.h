// The host device's page table: the reserved ranges, and the granules mapped in them. The driver
// checks its callers' arguments against it.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <utility>

#include "base/types.h"

namespace warmserve {

// Not thread-safe.
class HostAddresses {
 public:
  // A granule at an address. Granules that are adjacent both here and in one file form a run, which
  // is one kernel mapping.
  struct Mapped {
    Handle granule = Handle::none;
    std::uint64_t bytes = 0;
    bool begins_run = true;
  };
  using Table = std::map<Address, Mapped>;
  using Range = std::pair<Table::iterator, Table::iterator>;

  explicit HostAddresses(std::uint64_t granularity) : granularity_(granularity) {}

  void reserve(Address address, std::uint64_t bytes) { reservations_[address] = bytes; }
  // Returns whether exactly this range is a reservation and nothing is mapped in it.
  bool can_free(Address address, std::uint64_t bytes) const;
  void free(Address address) { reservations_.erase(address); }

  // Returns whether the range is aligned, not empty and inside one reservation, and nothing is
  // mapped in it.
  bool can_map(Address address, std::uint64_t bytes) const;
  void map(Address address, std::span<const Mapped> granules);
  // Returns the mappings that make up exactly this range; nullopt if the range cuts a mapping or
  // has a hole.
  std::optional<Range> whole(Address address, std::uint64_t bytes);
  void unmap(Range range);

  std::uint64_t runs() const noexcept { return runs_; }

 private:
  bool free_of_mappings(Address address, std::uint64_t bytes) const;

  const std::uint64_t granularity_;
  std::map<Address, std::uint64_t> reservations_;  // bytes by address
  Table mapped_;
  std::uint64_t runs_ = 0;
};

}  // namespace warmserve
