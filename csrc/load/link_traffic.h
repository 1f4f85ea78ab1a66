// The bytes in flight on a link, and an estimate of when it would finish more.
//
// Each piece takes the link that would finish it first. With m links of known speeds that sum to S,
// all with room, and pieces of b bytes, a load of B bytes then ends after at most
// (B + (m - 1) b) / S: when the piece that completes last was sent, no link would have finished it
// earlier (list scheduling on uniform machines, after Graham 1966). Slow or busy links therefore
// get few pieces.
#pragma once

#include <algorithm>
#include <limits>

#include "base/types.h"

namespace warmserve {

// Used under the owner's lock.
class LinkTraffic {
 public:
  bool idle() const { return under_way_ == 0; }
  std::uint64_t in_flight() const { return under_way_; }  // bytes
  void sent(std::uint64_t bytes, Deadline now) {
    if (idle()) since_ = now;
    under_way_ += bytes;
  }
  // Precondition: pieces complete in the order of their sends.
  void completed(std::uint64_t bytes, Deadline now) {
    // Not 0: two pieces may be seen to complete at the same time.
    seconds_ = kMemory * seconds_ + std::max(since(now), 1e-9);
    bytes_ = kMemory * bytes_ + static_cast<double>(bytes);
    since_ = now;
    under_way_ -= bytes;
  }
  // Removes a piece that will not complete; the bandwidth estimate does not change.
  void lost(std::uint64_t bytes) { under_way_ -= bytes; }

  // Bytes per second over the last pieces, without idle times; 0: not measured yet.
  double bandwidth() const { return seconds_ > 0 ? bytes_ / seconds_ : 0; }

  // Returns the estimated seconds from now until the link would finish `bytes` more bytes. A link
  // that was not measured yet is tried with one piece at a time: 0 if idle, else infinity. For a
  // link that makes no progress, the time since its last piece completed counts as slowness. A link
  // that has been idle may have become faster, so its estimate shrinks with the idle time and it is
  // tried again.
  double finish(std::uint64_t bytes, Deadline now) const {
    if (bytes_ == 0) return idle() ? 0 : std::numeric_limits<double>::infinity();
    const double passed = since(now);
    const double seconds =
        idle() ? seconds_ / (1 + std::min(kHope, passed / seconds_)) : std::max(seconds_, passed);
    return static_cast<double>(under_way_ + bytes) * seconds / bytes_;
  }

 private:
  static constexpr double kMemory = 0.75;  // decay of the sums per piece; the last four count most
  static constexpr double kHope = 3;  // an idle link is assumed at most 1 + kHope times as fast

  double since(Deadline now) const { return std::chrono::duration<double>(now - since_).count(); }

  std::uint64_t under_way_ = 0;
  Deadline since_{};  // when the link began the oldest piece in flight; idle: the last completion
  double seconds_ = 0, bytes_ = 0;
};

// Returns the link that would finish the bytes first; the first such link on a tie. Each link is a
// pointer to a struct with `takes()` and `traffic`; links that do not take copies are skipped.
// Returns null if every link is still busy with its first piece, so that no speed is known.
template <typename LinkList>
auto earliest_finish(const LinkList& links, std::uint64_t bytes, Deadline now) {
  decltype(&*links.front()) best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const auto& link : links) {
    if (!link->takes()) continue;
    if (const double finish = link->traffic.finish(bytes, now); finish < least) {
      least = finish;
      best = &*link;
    }
  }
  return best;
}

}  // namespace warmserve
