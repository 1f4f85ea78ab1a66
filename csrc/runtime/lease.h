// Leases: who may use which layers now, in the order they asked.
//
// A lease is admitted when all its layers, together with those already held, fit the arena. From
// then on they stay, and what is missing is loaded; so an admitted lease always gets there unless
// the device or the file fails. Those that do not fit wait in line. Nobody passes the head of the
// line but who asks only for what it already holds, or shares what another holds.
//
// A pass is one computation on a model, by one thread. It holds what leases hold when it begins,
// until it ends, whenever those leases end. No other pass can begin on what passes alone hold.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <vector>

#include "load/ticket.h"

namespace warmserve {

// The owner that a thread is: the number that Python's threading.get_ident() returns.
std::uint64_t this_thread() noexcept;

// One acquisition, or one pass. Under the runtime's lock.
struct Hold {
  std::vector<Selection> wants;  // each model once
  std::uint64_t owner = 0;       // a thread or a task: one that waits releases nothing meanwhile
  bool admitted = false;         // its layers count as held
  TicketPtr entry;               // done when it is admitted; null: it was at once
  TicketPtr ticket;              // of what was missing then; null: nothing
  std::map<const Model*, LayerSet> ordered;  // layers whose arrival was waited for
  std::size_t slot = 0;                      // in LeaseDesk::admitted_
  bool pass = false;
  unsigned depth = 0;                 // of a pass: how often its thread has begun it within itself
  std::vector<TicketPtr> arriving{};  // of a pass: layers that its streams wait for

  bool wants_layer(const Layer& layer) const noexcept {
    return warmserve::wants_layer(wants, layer);
  }
};
using HoldPtr = std::shared_ptr<Hold>;

// For messages: "lease on 'a', 'b'".
std::string lease_on(const std::vector<Selection>& wants);
// For messages, of a model that is in use: "'a' is leased".
std::string why_busy(const Model& model);

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
  // Begins a pass of the owner, or begins it again within itself. Null: no lease is on the model.
  // Wait-free.
  HoldPtr begin_pass(const Lock& lock, const ModelPtr& model, std::uint64_t owner);
  // Adds a layer that is leased to those that a pass holds.
  void extend(const Lock& lock, Hold& pass, const Layer& layer);
  // Whether the owner is inside a pass that holds any of these layers.
  bool in_pass(const Lock&, const Selection& selection, std::uint64_t owner) const;
  // Admits the head of the line if it fits now; null otherwise.
  HoldPtr admit_next(const Lock& lock);
  // Takes those that wait for the model out of the line.
  std::vector<HoldPtr> turn_away(const Lock& lock, const ModelPtr& model);
  // How many leases wait before this one.
  std::size_t ahead_of(const Lock& lock, const HoldPtr& hold) const;
  // Leaves the line, or gives up what is held.
  void leave(const Lock& lock, const HoldPtr& hold);

  std::size_t active() const noexcept { return admitted_.size(); }  // leases and passes
  std::size_t leases() const noexcept { return admitted_.size() - passes_.size(); }
  // An admitted hold on the layer whose load failed; null: there is none.
  const Hold* failed(const Lock&, const Layer& layer) const;

 private:
  bool fits(const Lock& lock, const Hold& hold) const;
  bool nested(const Hold& hold) const;
  bool would_deadlock() const;

  Books& books_;
  std::vector<Hold*> admitted_;
  std::vector<HoldPtr> passes_;  // also in admitted_; about one for each thread that computes
  std::list<HoldPtr> line_;
};

}  // namespace warmserve
