#include "simcuda/detector.h"

#include <cinttypes>
#include <cstdio>

namespace warmserve::simcuda {
namespace {

constexpr std::size_t kMostViolations = 200'000;  // bounds the memory of a report

std::string text_of(const char* function, const Touch& touch, const char* what) {
  char text[256];
  std::snprintf(text, sizeof text, "%s: %s of %" PRIu64 " bytes at 0x%" PRIx64 " %s", function,
                touch.write ? "write" : "read", touch.bytes, touch.address, what);
  return text;
}

}  // namespace

Agent Detector::add_agent() {
  for (std::size_t i = 0; i < retired_.size(); ++i) {
    const Agent agent = retired_[i];
    if (host.of(agent) < ticks_[agent]) continue;
    retired_[i] = retired_.back();
    retired_.pop_back();
    return agent;
  }
  ticks_.push_back(0);
  return static_cast<Agent>(ticks_.size() - 1);
}

bool Detector::observe(Memory& memory, const Work& work, Agent agent, VectorClock* clock,
                       std::uint64_t call, const char* function) {
  if (!on_) return false;
  touches_.clear();
  touches(work, &touches_);
  const std::uint64_t tick = ++ticks_[agent];
  clock->set(agent, tick);
  const Visitor visitor{agent, tick, *clock, host};
  const Touch *race = nullptr, *unwritten = nullptr;
  for (const Touch& touch : touches_) {
    if (touch.bytes == 0) continue;
    if (memory.reservation_at(touch.address)) {
      pieces_.clear();
      // Unmapped parts are reported when the operation runs.
      memory.walk(touch.address, touch.bytes, &pieces_);
      for (const Piece& piece : pieces_) {
        piece.mapping->uses.add(agent, tick);
        Shadow& shadow = piece.mapping->physical->shadow;
        // Memory of the host is not checked: writes of the CPU are not observed.
        if (!touch.write && !piece.mapping->physical->host &&
            !shadow.written(piece.page, piece.begin, piece.end))
          unwritten = &touch;
        if (shadow.access(piece.page, piece.begin, piece.end, touch.write, visitor)) race = &touch;
      }
    } else if (Pinned* const pinned = memory.pinned_at(touch.address)) {
      pinned->uses.add(agent, tick);
      const std::uint64_t granule = memory.granularity();
      const std::uint64_t first = touch.address - pinned->begin;
      const std::uint64_t last = std::min(first + touch.bytes, pinned->bytes);
      for (std::uint64_t at = first; at < last;) {
        const std::uint64_t page = at / granule, end = std::min(last, (page + 1) * granule);
        if (pinned->shadow.access(page, static_cast<std::uint32_t>(at % granule),
                                  static_cast<std::uint32_t>(end - page * granule), touch.write,
                                  visitor))
          race = &touch;
        at = end;
      }
    }
  }
  if (race && !said("race", call))
    violation("race", text_of(function, *race, "is not ordered after an earlier access"), call);
  if (unwritten && !said("uninitialised-read", call))
    violation("uninitialised-read", text_of(function, *unwritten, "that were never written"), call);
  return race != nullptr;
}

// Returns whether this violation was reported for the call. A graph launch is one call with many
// operations.
bool Detector::said(const char* kind, std::uint64_t call) const {
  for (auto last = violations_.rbegin(); last != violations_.rend() && last->call == call; ++last)
    if (last->kind == kind) return true;
  return false;
}

void Detector::take_away(Uses& uses, const char* what, const char* function, std::uint64_t call) {
  if (!on_ || uses.settled(host)) return;
  violation("use-while-unmapped",
            std::string(function) + ": " + what + " before its use was waited for", call);
}

void Detector::violation(const char* kind, std::string message, std::uint64_t call) {
  if (violations_.size() < kMostViolations) {
    violations_.push_back({kind, std::move(message), call});
  } else {
    ++dropped_;
  }
}

}  // namespace warmserve::simcuda
