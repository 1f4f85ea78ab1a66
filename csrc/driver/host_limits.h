// What the operating system will still give this process.
#pragma once

#include <string>

#include "base/types.h"

namespace warmserve {

// Bytes that could be allocated without swapping: the least of the machine's and of every memory
// control group above this process. `root`: where /proc and /sys are, for tests.
std::uint64_t available_memory(const std::string& root = "");
std::uint64_t total_memory();

// Bytes of the available memory that granules and pinned memory leave to the process itself, for
// page tables and for what it allocates while it loads.
constexpr std::uint64_t kKeptForProcess = 16 * kMiB;

// The kernel's limit of mappings per process (vm.max_map_count), and how many there are.
std::uint64_t mapping_limit();
std::uint64_t mapping_count();

}  // namespace warmserve
