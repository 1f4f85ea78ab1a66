// Leases: who may use which layers now, in the order they asked.
//
// A lease is admitted when all its layers, together with those already held, fit the arena. From
// then on they stay, and what is missing is loaded; so an admitted lease always gets there unless
// the device or the file fails. Those that do not fit wait in line. Nobody passes the head of the
// line but who asks only for what it already holds, or shares what another holds.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <vector>

#include "ticket.h"

namespace warmserve {

// One acquisition. Under the runtime's lock.
struct Hold {
  std::vector<Selection> wants;  // each model once
  std::uint64_t owner = 0;       // a thread or a task: one that waits releases nothing meanwhile
  bool admitted = false;         // its layers count as held
  TicketPtr entry;               // done when it is admitted; null: it was at once
  TicketPtr ticket;              // of what was missing then; null: nothing
  std::map<const Model*, LayerSet> ordered;  // layers whose arrival was waited for
  std::size_t slot = 0;                      // in LeaseDesk::admitted_

  bool wants_layer(const Layer& layer) const noexcept {
    return warmserve::wants_layer(wants, layer);
  }
};
using HoldPtr = std::shared_ptr<Hold>;

// For messages: "lease on 'a', 'b'".
std::string lease_on(const std::vector<Selection>& wants);

class LeaseDesk {
 public:
  explicit LeaseDesk(Books& books) : books_(books) {}

  // All under the runtime's lock.

  // Admits the hold if it fits and nobody waits before it. Wait-free.
  bool try_admit(const Lock& lock, const HoldPtr& hold);
  // Admits one that holds what an admitted one holds. Wait-free.
  void admit(const Lock& lock, const HoldPtr& hold);
  // Puts a hold in line. Throws out_of_device_memory where it could never be admitted, busy where
  // those that wait would wait for each other.
  void wait_in_line(const Lock& lock, const HoldPtr& hold);
  // Admits the head of the line if it fits now; null otherwise.
  HoldPtr admit_next(const Lock& lock);
  // Takes those that wait for the model out of the line.
  std::vector<HoldPtr> turn_away(const Lock& lock, const ModelPtr& model);
  // How many leases wait before this one.
  std::size_t ahead_of(const Lock& lock, const HoldPtr& hold) const;
  // Leaves the line, or gives up what is held.
  void leave(const Lock& lock, const HoldPtr& hold);

  std::size_t active() const noexcept { return admitted_.size(); }
  // An admitted hold on the layer whose load failed; null: there is none.
  const Hold* failed(const Lock&, const Layer& layer) const;

 private:
  bool fits(const Lock& lock, const Hold& hold) const;
  bool nested(const Hold& hold) const;
  bool would_deadlock() const;

  Books& books_;
  std::vector<Hold*> admitted_;
  std::list<HoldPtr> line_;
};

}  // namespace warmserve
