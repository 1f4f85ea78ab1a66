// A reusable lease for engines that lease the same layers at every step.
//
// In a client of a broker, a guard keeps its lease between uses, so that acquire() and release() of
// layers that are mapped are one atomic operation each: no lock, no message. The lease is recalled
// when the broker wants the layers back, when an eviction does, or when another lease needs their
// room; it then ends at once, or with the last release().
//
// Two words decide, and their order is the proof (tests/processes/): acquire() adds to `holds` and
// then reads `kept`; a recall clears `kept` and then reads `holds`. So either acquire() sees the
// recall and gives way, or the recall sees the hold and leaves the end of the lease to release().
#pragma once

#include <atomic>

#include "runtime/lease_queue.h"

namespace warmserve {

class Runtime;

// Thread-safe. The runtime must outlive the guard.
class Guard {
 public:
  Guard(Runtime& runtime, Selection wanted);
  ~Guard();  // ends all holds
  Guard(const Guard&) = delete;

  const Selection& wanted() const noexcept { return wanted_; }
  // Holds the layers, once all of them are resident. Blocks until then. Errors are those of
  // Runtime::begin_lease() and await_lease(); after one nothing is held.
  void acquire(Deadline deadline, const Poll& poll) {
    if (!try_acquire()) acquire_slowly(deadline, poll);
  }
  // Holds the layers if the lease was kept. Wait-free. Returns whether they are held. Throws
  // general in a forked child.
  bool try_acquire();
  // Ends the latest hold. Throws stale_view if there is none.
  void release() {
    if (holds_.load(std::memory_order_relaxed) == 0) throw_not_held();
    holds_.fetch_sub(1);
    if (!kept_.load()) end_if_unused();
  }
  std::uint32_t holds() const noexcept { return holds_.load(); }

  // Forbids new holds without the runtime's lock. Returns the lease if nothing holds it: the caller
  // ends it. Else the last release() does.
  LeasePtr recall(const Lock& lock);

 private:
  void acquire_slowly(Deadline deadline, const Poll& poll);
  void end_if_unused() noexcept;
  LeasePtr take_unused(const Lock&);
  [[noreturn]] static void throw_not_held();

  Runtime& runtime_;
  const Selection wanted_;
  std::atomic<std::uint32_t> holds_{0};
  std::atomic<bool> kept_{false};  // holds may begin without the runtime's lock
  LeasePtr lease_;  // while there are holds, and while kept; under the runtime's lock
};

}  // namespace warmserve
