// Digests of a layer's granules (kernels.h), summed from the layer's bytes in any order of arrival.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "base/types.h"

namespace warmserve {

// Host memory for a range of a layer: blocks of equal size, one per granule, or a single chunk.
struct Destination {
  std::uint64_t layer_offset = 0;  // of the first block
  std::uint64_t block_bytes = 0;
  std::vector<std::byte*> blocks;
};

// Calls visit(memory, bytes) for each contiguous piece of layer bytes [begin, end).
template <typename Visit>
void for_each_piece(const Destination& destination, std::uint64_t begin, std::uint64_t end,
                    Visit visit) {
  while (begin < end) {
    const std::uint64_t at = begin - destination.layer_offset;
    const std::uint64_t within = at % destination.block_bytes;
    const std::uint64_t bytes = end - begin < destination.block_bytes - within
                                    ? end - begin
                                    : destination.block_bytes - within;
    visit(destination.blocks[at / destination.block_bytes] + within, bytes);
    begin += bytes;
  }
}

// The digest that a granule of a layer must have.
struct ExpectedDigest {
  std::uint32_t granule = 0;
  std::uint64_t digest = 0;
};

// The division of a layer into granules; the last granule may be short.
struct GranuleCut {
  std::uint64_t granule_bytes = 0, layer_bytes = 0;

  std::uint64_t begin(std::uint32_t granule) const { return granule * granule_bytes; }
  std::uint64_t end(std::uint32_t granule) const {
    const std::uint64_t full = begin(granule) + granule_bytes;
    return full < layer_bytes ? full : layer_bytes;
  }
};

// Adds to each sums[i] the share of layer bytes [begin, end), read from the destination, in the
// digest of granule expected[i].granule.
// Precondition: neither `begin` nor an inner edge of a block cuts a word of 4 bytes.
void add_to_digests(std::span<const ExpectedDigest> expected, const GranuleCut& cut,
                    const Destination& destination, std::uint64_t begin, std::uint64_t end,
                    std::span<std::uint64_t> sums);
// Returns the first granule whose digest differs from the expected one.
// Precondition: all bytes of the granules have been added.
std::optional<std::uint32_t> wrong_granule(std::span<const ExpectedDigest> expected,
                                           const GranuleCut& cut,
                                           std::span<const std::uint64_t> sums);

}  // namespace warmserve
