#include "model/digests.h"

#include <algorithm>

#include "kernels/digest_parts.h"

namespace warmserve {

void add_to_digests(std::span<const ExpectedDigest> expected, const GranuleCut& cut,
                    const Destination& destination, std::uint64_t begin, std::uint64_t end,
                    std::span<std::uint64_t> sums) {
  const auto first =
      std::partition_point(expected.begin(), expected.end(),
                           [&](const ExpectedDigest& e) { return cut.end(e.granule) <= begin; });
  for (auto at = first; at != expected.end() && cut.begin(at->granule) < end; ++at) {
    const std::uint64_t granule = cut.begin(at->granule);
    std::uint64_t from = std::max(begin, granule);
    for_each_piece(destination, from, std::min(end, cut.end(at->granule)),
                   [&](const std::byte* memory, std::uint64_t bytes) {
                     sums[static_cast<std::size_t>(at - expected.begin())] +=
                         digest_part(memory, bytes, (from - granule) / 4);
                     from += bytes;
                   });
  }
}

std::optional<std::uint32_t> wrong_granule(std::span<const ExpectedDigest> expected,
                                           const GranuleCut& cut,
                                           std::span<const std::uint64_t> sums) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const std::uint32_t granule = expected[i].granule;
    if (digest_of_parts(sums[i], cut.end(granule) - cut.begin(granule)) != expected[i].digest)
      return granule;
  }
  return std::nullopt;
}

}  // namespace warmserve
