// Merges neighbouring layers, so that the ends of their last granules waste little memory.
#pragma once

#include <span>
#include <vector>

#include "checkpoint/layout.h"

namespace warmserve {

// Returns for each layer the number of the merged layer that it belongs to. Merged layers are runs
// of neighbours; each is the shortest run, from the first layer on, whose padding is at most
// `most_padding` as a share of its granules. If the last run has more padding, it takes in the runs
// before it until it has less, or until the whole model is one run. 1 merges none.
// Throws invalid_argument if the granule is 0 bytes, or `most_padding` is outside of [0, 1].
std::vector<std::uint32_t> merged_layers(std::span<const std::uint64_t> bytes,
                                         std::uint64_t granule_bytes, double most_padding);

// Lays out a layout's tensors in its merged layers. A merged layer of several has the names of its
// first and its last: "blocks.0 to blocks.3".
Layout merge(Layout layout, std::uint64_t granule_bytes, double most_padding);

}  // namespace warmserve
