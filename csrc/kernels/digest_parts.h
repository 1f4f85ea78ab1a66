// Computes the digest of a granule (kernels.h) on the CPU from pieces of the granule.
#pragma once

#include "base/types.h"

namespace warmserve {

// digest_part() returns the share of one piece, which begins at 4-byte word `first_word` of the
// granule. digest_of_parts() returns the digest of a granule of `bytes` bytes from the sum of its
// pieces' shares, added in any order.
// Precondition: only the granule's last piece may end within a word.
std::uint64_t digest_part(const std::byte* from, std::uint64_t bytes,
                          std::uint64_t first_word) noexcept;
std::uint64_t digest_of_parts(std::uint64_t sum, std::uint64_t bytes) noexcept;

}  // namespace warmserve
