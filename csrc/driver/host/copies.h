// Copies between ranges of host memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace warmserve {

// Copies bytes that nothing reads soon, such as weights: long ranges bypass the processor's caches,
// which would first read each line that is overwritten. When it returns, other threads see the
// bytes. The ranges must not overlap.
void copy_past_caches(std::byte* to, const std::byte* from, std::uint64_t bytes) noexcept;

}  // namespace warmserve
