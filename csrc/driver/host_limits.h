// The memory and mappings that the operating system still grants this process.
#pragma once

#include <string>

#include "base/types.h"

namespace warmserve {

// Returns the bytes that can be allocated without swapping: the minimum over the machine and every
// memory control group above this process. `root` is a prefix of /proc and /sys, for tests.
std::uint64_t available_memory(const std::string& root = "");
std::uint64_t total_memory();

// Bytes of the available memory that granules and pinned memory never take. The process needs them
// for page tables and for its own allocations during loads.
constexpr std::uint64_t kKeptForProcess = 16 * kMiB;

// The kernel's limit of mappings per process (vm.max_map_count), and the current number of them.
std::uint64_t mapping_limit();
std::uint64_t mapping_count();

}  // namespace warmserve
