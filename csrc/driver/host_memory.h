// Host memory that is committed before its first use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace warmserve {

// Reserves an aligned range of addresses without memory, which a forked child does not inherit.
// Returns null, with errno set, on failure.
std::byte* reserve_aligned(std::uint64_t bytes, std::uint64_t alignment) noexcept;

constexpr int kAnyNode = -1;

// Allocates zeroed memory that a forked child does not inherit. Several threads touch large ranges;
// pages are huge if the system has them, and on the NUMA node `node` as long as that node has
// memory that this process may use. Checks the available memory first. On failure returns null and
// sets `why`. Blocks.
std::byte* allocate_touched(std::uint64_t bytes, int node, std::string* why);
bool free_touched(std::byte* memory, std::uint64_t bytes) noexcept;

}  // namespace warmserve
