// The layers of a model as the caller describes them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "model/source.h"

namespace warmserve {

// A granule whose content is checked after each load. Without a digest, registration reads the
// files and uses the digest of their content.
struct GranuleCheck {
  std::uint32_t granule = 0;
  std::optional<std::uint64_t> digest{};
};
struct LayerShape {
  std::uint64_t bytes = 0;
  std::vector<Segment> segments;
  std::vector<GranuleCheck> checks{};  // ascending
};

// Checks a model's layers. The rest of the library trusts them after this check: a wrong offset
// would write out of bounds, and an overflowing sum would map a model over another model's memory.
// Throws invalid_argument; corrupt_checkpoint for a segment that does not end in its file.
void check_layout(const std::string& name, const std::vector<File>& files,
                  const std::vector<LayerShape>& layers, std::uint64_t granule_bytes);

}  // namespace warmserve
