// Host memory that is really there before it is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace warmserve {

// A range of addresses with nothing behind it, aligned, and not inherited by a forked child. Null,
// with errno set, where there is none.
std::byte* reserve_aligned(std::uint64_t bytes, std::uint64_t alignment) noexcept;

// Allocates zeroed memory that a forked child does not inherit. Several threads touch large ranges;
// pages are huge if the system has them. Looks at the available memory first. On failure returns
// null and says why. Blocks.
std::byte* allocate_touched(std::uint64_t bytes, std::string* why);
bool free_touched(std::byte* memory, std::uint64_t bytes) noexcept;

}  // namespace warmserve
