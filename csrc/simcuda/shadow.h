// The detector's record of memory: which agent accessed which bytes at which vector time, and which
// bytes were ever written.
//
// An agent runs operations in order: a stream, or one chain of a graph's nodes. The host runs no
// operations; its clock contains the operations that it has waited for.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "simcuda/shared.h"

namespace warmserve::simcuda {

using Agent = std::uint32_t;

// A point in vector time: for each agent, the number of its operations that are ordered before it.
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

// The last use by each agent of memory that can be released: a mapping or pinned memory.
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
  // Returns whether `clock` contains all uses. Removes the uses that it contains.
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

// An operation that is about to access memory: its agent, its tick, and the vector time that it is
// ordered after.
struct Visitor {
  Agent agent;
  std::uint64_t tick;
  const VectorClock& clock;  // clock.of(agent) is tick
  const VectorClock& host;   // vector time that every later operation is ordered after
};

class Shadow {
 public:
  explicit Shadow(std::uint64_t pages) : pages_(pages) {}

  // Records an access to bytes [begin, end) of a page. Returns true if an earlier access to some of
  // them is not ordered before this one, and at least one of the two writes.
  bool access(std::uint64_t page, std::uint32_t begin, std::uint32_t end, bool write,
              const Visitor& visitor);
  // Returns whether all of the bytes were written since the memory was allocated.
  bool written(std::uint64_t page, std::uint32_t begin, std::uint32_t end) const;
  // Keeps the written bytes in this file from now on, together with those that it has. The accesses
  // stay here: those of other processes are not known.
  void share(SharedFile* file);

 private:
  struct Access {
    std::uint32_t begin, end;
    Agent agent;
    bool write;
    std::uint64_t tick;
  };
  struct Page {
    // Accesses that the host has not waited for and that no later access replaces.
    std::vector<Access> accesses;
    std::vector<Range> written;  // ascending, neither overlapping nor adjacent; unused if shared
  };
  void mark_written(std::uint64_t page, std::uint32_t begin, std::uint32_t end);

  std::vector<std::unique_ptr<Page>> pages_;
  SharedFile* shared_ = nullptr;  // null: no other process can write the memory
};

}  // namespace warmserve::simcuda
