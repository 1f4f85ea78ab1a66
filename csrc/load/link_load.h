// What is under way on a link, and when it would have carried more.
//
// A piece goes to the link that will have carried it first. With m links of known speeds that sum
// to S, all with room, and pieces of b bytes, a load of B bytes is then over after (B + (m - 1) b)
// / S at the latest: when the piece that lands last was sent, no link would have carried it sooner
// (list scheduling on uniform machines, after Graham 1966). Who is slow or busy so takes few.
#pragma once

#include <algorithm>
#include <limits>

#include "base/types.h"

namespace warmserve {

// Under the owner's lock.
class LinkLoad {
 public:
  bool idle() const { return under_way_ == 0; }
  void sent(std::uint64_t bytes, Deadline now) {
    if (idle()) since_ = now;
    under_way_ += bytes;
  }
  // Pieces land in the order they were sent.
  void landed(std::uint64_t bytes, Deadline now) {
    seconds_ = kMemory * seconds_ + std::max(since(now), 1e-9);  // two may be seen at once
    bytes_ = kMemory * bytes_ + static_cast<double>(bytes);
    since_ = now;
    under_way_ -= bytes;
  }
  // It will not land, and nothing is learned from it.
  void lost(std::uint64_t bytes) { under_way_ -= bytes; }

  // Bytes a second over the last pieces, idle times not counted; 0: not measured yet.
  double bandwidth() const { return seconds_ > 0 ? bytes_ / seconds_ : 0; }

  // Seconds from now at which it would have carried so many more bytes. One that was not measured
  // yet is tried with a piece at a time. One that stands still is as slow as that makes it; one
  // that has been idle may have become faster, so that it is tried again.
  double finish(std::uint64_t bytes, Deadline now) const {
    if (bytes_ == 0) return idle() ? 0 : std::numeric_limits<double>::infinity();
    const double passed = since(now);
    const double seconds =
        idle() ? seconds_ / (1 + std::min(kHope, passed / seconds_)) : std::max(seconds_, passed);
    return static_cast<double>(under_way_ + bytes) * seconds / bytes_;
  }

 private:
  static constexpr double kMemory = 0.75;  // what is left of the sums with each piece: four count
  static constexpr double kHope = 3;       // an idle link is at most so much faster than it was

  double since(Deadline now) const { return std::chrono::duration<double>(now - since_).count(); }

  std::uint64_t under_way_ = 0;
  Deadline since_{};  // when the oldest piece under way had the link for itself
  double seconds_ = 0, bytes_ = 0;
};

// Of the links, each a pointer to something with a `load` that `takes()`, the one that will have
// carried the bytes first; of equals the first. Null: all are at their first piece yet.
template <typename Links>
auto soonest(const Links& links, std::uint64_t bytes, Deadline now) {
  decltype(&*links.front()) best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const auto& link : links) {
    if (!link->takes()) continue;
    if (const double finish = link->load.finish(bytes, now); finish < least) {
      least = finish;
      best = &*link;
    }
  }
  return best;
}

}  // namespace warmserve
