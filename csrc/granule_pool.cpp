#include "granule_pool.h"

#include <algorithm>

namespace warmserve {

std::vector<GranulePool::Run> GranulePool::runs() const {
  std::vector<Run> runs;
  for (GranuleId id = 0; id < free_.size(); ++id) {
    if (!free_[id]) continue;
    if (!runs.empty() && runs.back().first + runs.back().length == id)
      ++runs.back().length;
    else
      runs.push_back({id, 1});
  }
  return runs;
}

std::vector<GranuleId> GranulePool::take(std::uint32_t count) {
  std::vector<GranuleId> taken;
  if (count == 0) return taken;
  taken.reserve(count);
  std::vector<Run> candidates = runs();
  const auto fits = std::find_if(candidates.begin(), candidates.end(),
                                 [&](const Run& run) { return run.length >= count; });
  if (fits != candidates.end())
    candidates = {*fits};
  else
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Run& a, const Run& b) { return a.length > b.length; });
  for (const Run& run : candidates)
    for (std::uint32_t i = 0; i < run.length && taken.size() < count; ++i)
      taken.push_back(run.first + i);
  std::sort(taken.begin(), taken.end());
  for (const GranuleId id : taken) free_[id] = false;
  count_ -= count;
  return taken;
}

void GranulePool::give(std::span<const GranuleId> ids) noexcept {
  for (const GranuleId id : ids) free_[id] = true;
  count_ += static_cast<std::uint32_t>(ids.size());
}

}  // namespace warmserve
