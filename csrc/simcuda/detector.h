// Detects operations that access the same bytes without a defined order, memory that is released
// while operations may still use it, and reads of bytes that were never written. The results do not
// depend on timing.
//
// For memory that the CPU can access, only accesses of the device are checked, and its initial
// content counts as written.
//
// Operations are checked when they are enqueued, in the order of the calls. They are ordered by:
// - their stream;
// - an event that is recorded and waited for;
// - the host, if it waited for one operation and enqueued the other after that. Waits are
//   cuStreamSynchronize, cuCtxSynchronize, cuEventSynchronize, a query that returned success, and
//   copies that CUDA documents as synchronous (between host and device; not cuMemcpyDtoD, not
//   cuMemset of device memory, not an Async copy from device to pageable memory, which "might be
//   synchronous"). A copy from pageable memory waits for the operations before it in its stream and
//   for its source to be read, but not for the write to the device;
// - the legacy stream: each of its operations, including event records and waits, follows all
//   operations enqueued before in blocking streams, and precedes all operations enqueued later in
//   them. A wait for it is also a wait for the blocking streams;
// - the edges of a graph; and each launch of a graph follows the launch before it.
// The host is one agent; the order among its threads is checked by ThreadSanitizer instead.
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
  // Releases an agent's number, which is reused once the host has waited for all its operations.
  // Operations of the agent may still be running.
  void retire(Agent agent) { retired_.push_back(agent); }

  VectorClock host;
  void host_knows(const VectorClock& clock) {
    if (on_) host.join(clock);
  }

  // Checks an operation that `agent` enqueues, ordered after `clock`, and adds it to `clock`.
  // Returns whether the operation races with an earlier one.
  bool observe(Memory& memory, const Work& work, Agent agent, VectorClock* clock,
               std::uint64_t call, const char* function);
  // Checks the release of memory that had these uses.
  void take_away(Uses& uses, const char* what, const char* function, std::uint64_t call);

  void violation(const char* kind, std::string message, std::uint64_t call);
  const std::vector<Violation>& violations() const { return violations_; }
  std::uint64_t dropped() const { return dropped_; }

 private:
  bool said(const char* kind, std::uint64_t call) const;

  const bool on_;
  std::vector<std::uint64_t> ticks_;  // per agent
  std::vector<Agent> retired_;
  std::vector<Touch> touches_;  // members only to reuse their allocations
  std::vector<Piece> pieces_;
  std::vector<Violation> violations_;
  std::uint64_t dropped_ = 0;
};

}  // namespace warmserve::simcuda
