// The host device's page table: ranges that are reserved, and what is mapped in them. The driver
// checks against it what its caller says.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <utility>

#include "base/types.h"

namespace warmserve {

// Not synchronised.
class HostAddresses {
 public:
  // A granule at an address. Granules that follow each other in the memfd too are one mapping of
  // the kernel's, a run.
  struct Mapped {
    Handle granule = Handle::none;
    std::uint64_t bytes = 0;
    bool begins_run = true;
  };
  using Table = std::map<Address, Mapped>;
  using Range = std::pair<Table::iterator, Table::iterator>;

  explicit HostAddresses(std::uint64_t granularity) : granularity_(granularity) {}

  void reserve(Address address, std::uint64_t bytes) { reservations_[address] = bytes; }
  // Whether exactly this range is reserved and nothing is mapped in it.
  bool can_free(Address address, std::uint64_t bytes) const;
  void free(Address address) { reservations_.erase(address); }

  // Whether the range is aligned, not empty, inside one reservation, and nothing is mapped in it.
  bool can_map(Address address, std::uint64_t bytes) const;
  void map(Address address, std::span<const Mapped> granules);
  // The mappings that make up exactly this range; none where one is cut or a hole is between them.
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
