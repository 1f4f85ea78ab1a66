// Host memory that is really there before it is used.
#pragma once

#include <cstddef>
#include <cstdint>

namespace warmserve {

// Zeroed memory, touched by several threads where it is large, in huge pages where the system has
// them, and not inherited by a forked child. Null when there is none. Blocks.
std::byte* allocate_touched(std::uint64_t bytes) noexcept;
bool free_touched(std::byte* memory, std::uint64_t bytes) noexcept;

}  // namespace warmserve
