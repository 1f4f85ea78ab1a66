// Host memory that is really there before it is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace warmserve {

// A range of addresses with nothing behind it, aligned, and not inherited by a forked child. Null,
// with errno set, where there is none.
std::byte* reserve_aligned(std::uint64_t bytes, std::uint64_t alignment) noexcept;

// Zeroed memory, touched by several threads where it is large, in huge pages where the system has
// them, and not inherited by a forked child. Null when there is none,
// and `why` then says so. What is available is looked at first. Blocks.
std::byte* allocate_touched(std::uint64_t bytes, std::string* why);
bool free_touched(std::byte* memory, std::uint64_t bytes) noexcept;

}  // namespace warmserve
