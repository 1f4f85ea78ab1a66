#include "checkpoint/merging.h"

#include "base/error.h"

namespace warmserve {
namespace {

// A run of neighbouring layers.
struct Run {
  std::size_t first = 0;  // layer
  std::uint64_t bytes = 0;
};

}  // namespace

std::vector<std::uint32_t> merged_layers(std::span<const std::uint64_t> bytes,
                                         std::uint64_t granule_bytes, double most_padding) {
  if (granule_bytes == 0) throw Error(ErrorKind::invalid_argument, "a granule must have bytes");
  if (!(most_padding >= 0 && most_padding <= 1))
    throw Error(ErrorKind::invalid_argument, "max_padding must be from 0 to 1");
  const auto wastes_little = [&](std::uint64_t used) {
    const std::uint64_t rest = used % granule_bytes;
    const auto padding = static_cast<double>(rest ? granule_bytes - rest : 0);
    return padding <= most_padding * (static_cast<double>(used) + padding);
  };
  std::vector<Run> runs;
  bool closed = true;  // whether the last run takes no further layer
  for (std::size_t layer = 0; layer < bytes.size(); ++layer) {
    if (closed) runs.push_back({.first = layer});
    runs.back().bytes += bytes[layer];
    closed = wastes_little(runs.back().bytes);
  }
  while (runs.size() > 1 && !wastes_little(runs.back().bytes)) {
    const std::uint64_t last = runs.back().bytes;
    runs.pop_back();
    runs.back().bytes += last;
  }
  std::vector<std::uint32_t> merged(bytes.size());
  for (std::size_t run = 0; run < runs.size(); ++run) {
    const std::size_t end = run + 1 < runs.size() ? runs[run + 1].first : bytes.size();
    for (std::size_t layer = runs[run].first; layer < end; ++layer)
      merged[layer] = static_cast<std::uint32_t>(run);
  }
  return merged;
}

Layout merge(Layout layout, std::uint64_t granule_bytes, double most_padding) {
  const auto merged = merged_layers(layout.bytes, granule_bytes, most_padding);
  if (merged.empty() || merged.back() + 1 == merged.size()) return layout;
  StringList names;
  for (std::uint32_t layer = 0; layer < merged.size(); ++layer) {
    const bool first = layer == 0 || merged[layer] != merged[layer - 1];
    const bool last = layer + 1 == merged.size() || merged[layer] != merged[layer + 1];
    if (!first && !last) continue;
    std::string& name = names.pending();
    if (!first) name += " to ";
    name += layout.names[layer];
    if (last) names.add_pending();
  }
  std::vector<std::uint32_t> group_of(layout.places.size());
  for (std::size_t tensor = 0; tensor < group_of.size(); ++tensor)
    group_of[tensor] = merged[layout.places[tensor].layer];
  return lay_out(layout.table, names, group_of, std::move(layout.types));
}

}  // namespace warmserve
