// Finds, whatever the timing was, operations that touch the same bytes in no order, memory that is
// taken away while something may still use it, and bytes that are read and were never written.
//
// Of memory that the CPU reaches only what the device does is judged; its first content is the
// program's affair.
// Everything is judged when it is enqueued, in the order of the calls. What orders operations:
// - their stream; an event recorded and waited for; the host, where it waited for one and enqueued
//   the other after that: cuStreamSynchronize, cuCtxSynchronize, cuEventSynchronize, a query that
//   said success, and copies that CUDA documents as synchronous (between host and device; not
//   cuMemcpyDtoD, not cuMemset of device memory, not an Async copy from device to pageable memory,
//   which "might be synchronous"). One from pageable memory waits for what is before it in its
//   stream and for its source to be read, but not for the write to the device;
// - the legacy stream: whatever is enqueued in it, positions of events and waits included, comes
//   after all that was enqueued in blocking streams, and before all that follows in them;
//   synchronising with it is synchronising with the blocking streams too;
// - a graph's edges; a launch of a graph comes after the launch before it.
// The host is one agent: the order among its threads is a matter for ThreadSanitizer.
#pragma once

#include <string>

#include "simcuda/work.h"

namespace warmserve::simcuda {

struct Violation {
  std::string kind, message;
  std::uint64_t call;
};

class Detector {
 public:
  explicit Detector(bool on) : on_(on) {}
  bool on() const { return on_; }

  Agent add_agent();
  // Its operations may still be under way; its number is used again once the host knows them all.
  void retire(Agent agent) { retired_.push_back(agent); }

  VectorClock host;
  void host_knows(const VectorClock& clock) {
    if (on_) host.join(clock);
  }

  // Records that `agent` enqueues an operation ordered after `clock`, and adds it to that clock.
  // Returns whether the operation races with an earlier one.
  bool observe(Memory& memory, const Work& work, Agent agent, VectorClock* clock,
               std::uint64_t call, const char* function);
  // Something is taken away that was used so.
  void take_away(Uses& uses, const char* what, const char* function, std::uint64_t call);

  void violation(const char* kind, std::string message, std::uint64_t call);
  const std::vector<Violation>& violations() const { return violations_; }
  std::uint64_t dropped() const { return dropped_; }

 private:
  bool said(const char* kind, std::uint64_t call) const;

  const bool on_;
  std::vector<std::uint64_t> ticks_;  // of each agent
  std::vector<Agent> retired_;
  std::vector<Touch> touches_;  // kept for their memory
  std::vector<Piece> pieces_;
  std::vector<Violation> violations_;
  std::uint64_t dropped_ = 0;
};

}  // namespace warmserve::simcuda
