// The host device's physical memory: slots of one sparse memfd, which grows as slots are needed and
// is no longer than they are.
//
// Every slot is writable through a view that no user of the device sees. A view does not survive
// fork (MADV_DONTFORK). Views are mapped an extent at a time, so that many small slots take few of
// the kernel's mappings.
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

  // `root`: where /proc and /sys are, for tests. Throws general, naming the call that failed.
  HostSlots(bool huge_pages, std::string root);
  ~HostSlots();
  HostSlots(const HostSlots&) = delete;

  int descriptor() const noexcept { return memfd_; }
  std::uint64_t mappings() const;  // of the kernel, for the views

  // Bytes that slots could still be made of: what the machine and its control groups have, less
  // what the process itself needs to go on.
  std::uint64_t available() const;

  // Allocates memory and touches it. Looks at the available memory first, because the kernel kills
  // a process that touches more. On failure says why. Blocks.
  Status create(std::uint64_t bytes, std::uint64_t* offset, std::string* why);
  // Gives the memory back; the offset may be used again. False where the kernel refuses.
  bool recycle(std::uint64_t offset, std::uint64_t bytes);
  // Where the CPU writes a slot.
  std::byte* view(std::uint64_t offset) const;

 private:
  Status find_room(std::uint64_t bytes, std::string* why);
  Status take_offset(std::uint64_t bytes, std::uint64_t* offset, std::string* why);
  Status map_extent(std::uint64_t bytes, std::string* why);
  bool populate(std::byte* slot, std::uint64_t offset, std::uint64_t bytes);
  bool punch(std::uint64_t offset, std::uint64_t bytes) const;

  const bool huge_pages_;
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
  std::uint64_t allowed_ = 0;     // bytes that may be populated without another look
  std::uint64_t populating_ = 0;  // bytes that are being populated
  Deadline look_again_{};
};

}  // namespace warmserve
