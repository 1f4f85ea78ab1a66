// The digest of a granule (kernels.h), made on the CPU from pieces of it.
#pragma once

#include "base/types.h"

namespace warmserve {

// digest_of_parts() of the sum of digest_part() over the pieces of a
// granule of that many bytes, in any order, is its digest. A piece begins at word `first_word`, of
// 4 bytes, of the granule, and only the last ends within one.
std::uint64_t digest_part(const std::byte* from, std::uint64_t bytes,
                          std::uint64_t first_word) noexcept;
std::uint64_t digest_of_parts(std::uint64_t sum, std::uint64_t bytes) noexcept;

}  // namespace warmserve
