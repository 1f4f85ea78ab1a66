// What the detector remembers of memory: who touched which bytes when, in vector time, and which
// bytes were ever written.
//
// An agent is whatever runs operations in order: a stream, or one chain of a graph's nodes. The
// host runs none; its clock says what it has waited for.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace warmserve::simcuda {

using Agent = std::uint32_t;

// For each agent, how many of its operations are known to have happened.
class VectorClock {
 public:
  std::uint64_t of(Agent agent) const { return agent < ticks_.size() ? ticks_[agent] : 0; }
  void set(Agent agent, std::uint64_t tick) {
    if (agent >= ticks_.size()) ticks_.resize(agent + 1);
    ticks_[agent] = tick;
  }
  void join(const VectorClock& other) {
    if (ticks_.size() < other.ticks_.size()) ticks_.resize(other.ticks_.size());
    for (std::size_t i = 0; i < other.ticks_.size(); ++i)
      if (ticks_[i] < other.ticks_[i]) ticks_[i] = other.ticks_[i];
  }
  bool covers(const VectorClock& other) const {
    for (Agent i = 0; i < other.ticks_.size(); ++i)
      if (of(i) < other.ticks_[i]) return false;
    return true;
  }

 private:
  std::vector<std::uint64_t> ticks_;
};

// The last use by each agent of something that can be taken away: a mapping, pinned memory.
class Uses {
 public:
  void add(Agent agent, std::uint64_t tick) {
    for (Use& use : uses_) {
      if (use.agent == agent) {
        use.tick = tick;
        return;
      }
    }
    uses_.push_back({agent, tick});
  }
  // Whether all are known in `clock`; those that are, are forgotten.
  bool settled(const VectorClock& clock) {
    std::erase_if(uses_, [&](const Use& use) { return clock.of(use.agent) >= use.tick; });
    return uses_.empty();
  }
  void clear() { uses_.clear(); }

 private:
  struct Use {
    Agent agent;
    std::uint64_t tick;
  };
  std::vector<Use> uses_;
};

// Who is about to touch memory: its agent, its own tick, and all that it is ordered after.
struct Visitor {
  Agent agent;
  std::uint64_t tick;
  const VectorClock& clock;  // clock.of(agent) is tick
  const VectorClock& host;   // what every later operation is ordered after
};

class Shadow {
 public:
  explicit Shadow(std::uint64_t pages) : pages_(pages) {}

  // Bytes [begin, end) of a page. True where an earlier access to some of them is not ordered
  // before this one, and one of the two writes.
  bool access(std::uint64_t page, std::uint32_t begin, std::uint32_t end, bool write,
              const Visitor& visitor);
  // Whether all of the bytes were written since the memory was made.
  bool written(std::uint64_t page, std::uint32_t begin, std::uint32_t end) const;

 private:
  struct Access {
    std::uint32_t begin, end;
    Agent agent;
    bool write;
    std::uint64_t tick;
  };
  struct Range {
    std::uint32_t begin, end;
  };
  struct Page {
    std::vector<Access> accesses;  // those not known to the host, less what later ones stand for
    std::vector<Range> written;    // ascending, apart
  };
  void mark_written(Page& page, std::uint32_t begin, std::uint32_t end);

  std::vector<std::unique_ptr<Page>> pages_;
};

}  // namespace warmserve::simcuda
