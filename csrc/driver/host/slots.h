// The host device's physical memory: slots of one sparse memfd. The memfd grows with the slots and
// ends where the last slot ends; or it is given, and then it keeps its size and its contents.
//
// Every slot is writable through a view that users of the device do not see. A forked child does
// not inherit the views (MADV_DONTFORK). Views are mapped an extent at a time, so that many small
// slots take few kernel mappings.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <string>

#include "driver/driver.h"

namespace warmserve {

class HostSlots {
 public:
  static constexpr std::uint64_t kGranularity = 2 * kMiB;

  // `root` is a prefix of /proc and /sys, for tests. `given` is a descriptor of a memfd, which is
  // duplicated, or -1. Throws general, which names the failed call.
  HostSlots(bool huge_pages, std::string root, int given);
  ~HostSlots();
  HostSlots(const HostSlots&) = delete;

  int descriptor() const noexcept { return memfd_; }
  // Returns a new descriptor, which the caller closes; -1 with errno on failure.
  int read_only_descriptor() const;
  std::uint64_t mappings() const;  // kernel mappings that the views take

  // Returns the bytes left for slots: the available memory of the machine and its control groups,
  // minus kKeptForProcess; and the bytes that a given memfd has beside its slots.
  std::uint64_t available() const;

  // Allocates memory and touches it. Checks the available memory first, because the kernel kills a
  // process that touches more. On failure sets `why`. Blocks.
  Status create(std::uint64_t bytes, std::uint64_t* offset, std::string* why);
  // Returns the memory to the kernel and makes the offset reusable. Returns false on failure.
  bool recycle(std::uint64_t offset, std::uint64_t bytes);
  // Returns the address at which the CPU writes a slot.
  std::byte* view(std::uint64_t offset) const;

 private:
  Status find_room(std::uint64_t bytes, std::string* why);
  Status take_offset(std::uint64_t bytes, std::uint64_t* offset, std::string* why);
  Status map_extent(std::uint64_t bytes, std::string* why);
  bool populate(std::byte* slot, std::uint64_t offset, std::uint64_t bytes);
  bool punch(std::uint64_t offset, std::uint64_t bytes) const;

  void map_given();
  std::uint64_t unused() const;  // available memory, minus kKeptForProcess

  const bool huge_pages_, given_;
  const std::string root_;
  int memfd_ = -1;

  struct Extent {
    std::byte* memory;
    std::uint64_t bytes;
  };
  mutable std::mutex mutex_;                                // guards all below
  std::map<std::uint64_t, Extent> extents_;                 // by offset; without holes
  std::uint64_t mapped_ = 0, end_ = 0;                      // ends of the extents and of the slots
  std::set<std::pair<std::uint64_t, std::uint64_t>> free_;  // bytes, offset
  std::uint64_t allowed_ = 0;     // bytes that may be populated before the next check
  std::uint64_t populating_ = 0;  // bytes being populated now
  std::uint64_t present_ = 0;     // bytes of a given memfd that have pages and are in no slot yet
  Deadline look_again_{};
};

}  // namespace warmserve
