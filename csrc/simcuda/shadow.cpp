#include "simcuda/shadow.h"

#include <algorithm>
#include <utility>

namespace warmserve::simcuda {
namespace {

void add(std::vector<Range>& ranges, std::uint32_t begin, std::uint32_t end) {
  const auto first = std::lower_bound(ranges.begin(), ranges.end(), begin,
                                      [](const Range& r, std::uint32_t at) { return r.end < at; });
  auto last = first;
  for (; last != ranges.end() && last->begin <= end; ++last) {
    begin = std::min(begin, last->begin);
    end = std::max(end, last->end);
  }
  if (first == last) {
    ranges.insert(first, {begin, end});
  } else {
    *first = {begin, end};
    ranges.erase(first + 1, last);
  }
}

bool contains(const std::vector<Range>& ranges, std::uint32_t begin, std::uint32_t end) {
  const auto found = std::lower_bound(ranges.begin(), ranges.end(), end,
                                      [](const Range& r, std::uint32_t at) { return r.end < at; });
  return found != ranges.end() && found->begin <= begin;
}

}  // namespace

bool Shadow::access(std::uint64_t index, std::uint32_t begin, std::uint32_t end, bool write,
                    const Visitor& visitor) {
  std::unique_ptr<Page>& slot = pages_[index];
  if (!slot) slot = std::make_unique<Page>();
  Page& page = *slot;
  bool race = false;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < page.accesses.size(); ++i) {
    const Access earlier = page.accesses[i];
    // Every later operation is ordered after the operations that the host has waited for.
    if (visitor.host.of(earlier.agent) >= earlier.tick) continue;
    const bool before = visitor.clock.of(earlier.agent) >= earlier.tick;
    const bool overlaps = earlier.begin < end && begin < earlier.end;
    if (overlaps && !before && (write || earlier.write)) race = true;
    // This access replaces `earlier`: a later access that is not ordered after `earlier` is not
    // ordered after this access either, and conflicts with it if it conflicts with `earlier`.
    const bool within = begin <= earlier.begin && earlier.end <= end;
    if (before && within && (write || !earlier.write)) continue;
    page.accesses[kept++] = earlier;
  }
  page.accesses.resize(kept);
  // Consecutive pieces of one operation are merged into one entry.
  if (!page.accesses.empty()) {
    Access& last = page.accesses.back();
    if (last.agent == visitor.agent && last.tick == visitor.tick && last.write == write &&
        last.end == begin) {
      last.end = end;
      if (write) mark_written(index, begin, end);
      return race;
    }
  }
  page.accesses.push_back({begin, end, visitor.agent, write, visitor.tick});
  if (write) mark_written(index, begin, end);
  return race;
}

void Shadow::mark_written(std::uint64_t index, std::uint32_t begin, std::uint32_t end) {
  if (shared_) {
    shared_->change_written(index, [=](std::vector<Range>& ranges) { add(ranges, begin, end); });
  } else {
    add(pages_[index]->written, begin, end);
  }
}

bool Shadow::written(std::uint64_t index, std::uint32_t begin, std::uint32_t end) const {
  if (shared_) return contains(shared_->written(index), begin, end);
  return pages_[index] && contains(pages_[index]->written, begin, end);
}

void Shadow::share(SharedFile* file) {
  for (std::uint64_t index = 0; index < pages_.size(); ++index) {
    if (!pages_[index]) continue;
    for (const Range& range : std::exchange(pages_[index]->written, {}))
      file->change_written(
          index, [&](std::vector<Range>& ranges) { add(ranges, range.begin, range.end); });
  }
  shared_ = file;
}

}  // namespace warmserve::simcuda
