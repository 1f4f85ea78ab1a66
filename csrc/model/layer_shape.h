// The layers of a model as its caller describes them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "model/source.h"

namespace warmserve {

// A granule whose content is checked after each load; without a digest it is what the files have
// when the model is registered, which reads them.
struct GranuleCheck {
  std::uint32_t granule = 0;
  std::optional<std::uint64_t> digest{};
};
struct LayerShape {
  std::uint64_t bytes = 0;
  std::vector<Segment> segments;
  std::vector<GranuleCheck> checks{};  // ascending
};

// The rest of the library trusts what was checked here: a wrong offset would be a write out of
// bounds, and a sum that overflows would map a model over another one's memory. Throws
// invalid_argument; corrupt_checkpoint for a segment that does not end in its file.
void check_layout(const std::string& name, const std::vector<File>& files,
                  const std::vector<LayerShape>& layers, std::uint64_t granule_bytes);

}  // namespace warmserve
