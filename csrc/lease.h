// Leases: who may use which models now, in the order they asked.
//
// A lease is admitted when all its models, together with those already held, fit the arena. From
// then on their layers stay, and what is missing is loaded; so an admitted lease always gets there
// unless the device or the file fails. Those that do not fit wait in line. Nobody passes the head
// of the line but who asks only for what it already holds.
#pragma once

#include <list>
#include <memory>
#include <vector>

#include "ticket.h"

namespace warmserve {

// One acquisition. Under the runtime's lock.
struct Hold {
  std::vector<ModelPtr> models;  // each once
  std::uint64_t owner = 0;       // a thread or a task: one that waits releases nothing meanwhile
  bool admitted = false;         // its models count as held
  TicketPtr ticket;              // what it waits for; null: nothing was missing
  std::size_t slot = 0;          // in LeaseDesk::admitted_
};
using HoldPtr = std::shared_ptr<Hold>;

class LeaseDesk {
 public:
  explicit LeaseDesk(Books& books) : books_(books) {}

  // All under the runtime's lock.

  // Admits the hold if it fits and nobody waits before it. Wait-free.
  bool try_admit(const Lock& lock, const HoldPtr& hold);
  // Puts a hold in line. Throws out_of_device_memory where it could never be admitted, busy where
  // those that wait would wait for each other.
  void wait_in_line(const Lock& lock, const HoldPtr& hold);
  // Admits the head of the line if it fits now; null otherwise.
  HoldPtr admit_next(const Lock& lock);
  // Takes those that wait for the model out of the line.
  std::vector<HoldPtr> turn_away(const Lock& lock, const ModelPtr& model);
  // Leaves the line, or gives up what is held.
  void leave(const Lock& lock, const HoldPtr& hold);

  std::size_t active() const noexcept { return admitted_.size(); }

 private:
  bool fits(const Hold& hold) const;
  bool nested(const Hold& hold) const;
  void admit(const Lock& lock, const HoldPtr& hold);
  bool would_deadlock() const;

  Books& books_;
  std::vector<Hold*> admitted_;
  std::list<HoldPtr> line_;
};

}  // namespace warmserve
