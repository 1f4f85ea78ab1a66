// The admission of leases and passes to layers, in order of arrival.
//
// A lease is admitted when its layers fit the arena together with all layers already held. From
// then on its layers are not evicted, and the missing ones are loaded. An admitted lease therefore
// always gets its layers, unless the device or a file fails. A lease that does not fit waits in
// line. Only two kinds of lease are admitted ahead of the line: a lease on layers that its owner
// already holds, and a lease that shares the layers of an admitted lease.
//
// A pass is one computation on a model by one thread. It holds the layers that leases hold when it
// begins. It keeps them until it ends, even if those leases end before. Layers that only passes
// hold are not available to new passes.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <vector>

#include "load/ticket.h"

namespace warmserve {

// Returns the owner number of the calling thread, the same as Python's threading.get_ident().
std::uint64_t this_thread() noexcept;

// One lease or one pass. Guarded by the runtime's lock.
struct Hold {
  std::vector<Selection> wants;  // each model once
  std::uint64_t owner = 0;       // thread or task; an owner that waits is taken to release nothing
  bool admitted = false;         // its layers count as held
  TicketPtr entry;               // done on admission; null: admitted at once
  TicketPtr ticket;  // loads the layers missing on admission; null: no layer was missing
  std::map<const Model*, LayerSet> ordered;  // layers that await_layer() has waited for
  std::size_t slot = 0;                      // index in LeaseDesk::admitted_
  bool pass = false;
  unsigned depth = 0;                 // of a pass: nested begins that have not ended
  std::vector<TicketPtr> arriving{};  // of a pass: loads of layers that its streams wait for

  bool wants_layer(const Layer& layer) const noexcept {
    return warmserve::wants_layer(wants, layer);
  }
};
using HoldPtr = std::shared_ptr<Hold>;

// Returns "lease on 'a', 'b'", for messages.
std::string lease_on(const std::vector<Selection>& wants);
// Returns "'a' is leased" or the equivalent for a pass, for messages.
std::string why_busy(const Model& model);

class LeaseDesk {
 public:
  explicit LeaseDesk(Books& books) : books_(books) {}

  // All functions are called under the runtime's lock.

  // Admits the hold if it fits and no hold waits in line, or if its owner already holds all its
  // layers. Returns whether it was admitted. Wait-free.
  bool try_admit(const Lock& lock, const HoldPtr& hold);
  // Admits a hold unconditionally. Precondition: its layers fit, or other holds hold them.
  // Wait-free.
  void admit(const Lock& lock, const HoldPtr& hold);
  // Puts a hold in line. Throws out_of_device_memory if the hold exceeds the arena, busy if the
  // waiting owners would then wait for each other for ever.
  void wait_in_line(const Lock& lock, const HoldPtr& hold);
  // Begins a pass of the owner, or a nested part of the pass that the owner is in. Returns null if
  // no lease is on the model. Wait-free.
  HoldPtr begin_pass(const Lock& lock, const ModelPtr& model, std::uint64_t owner);
  // Adds a leased layer to a pass.
  void extend(const Lock& lock, Hold& pass, const Layer& layer);
  // Returns whether the owner is inside a pass that holds any of these layers.
  bool in_pass(const Lock&, const Selection& selection, std::uint64_t owner) const;
  // Admits the head of the line and returns it. Returns null if the line is empty or its head does
  // not fit.
  HoldPtr admit_next(const Lock& lock);
  // Removes the holds that wait for the model from the line and returns them.
  std::vector<HoldPtr> turn_away(const Lock& lock, const ModelPtr& model);
  // Returns how many leases wait in line before this one.
  std::size_t ahead_of(const Lock& lock, const HoldPtr& hold) const;
  // Removes the hold from the line or, if it is admitted, releases its layers.
  void leave(const Lock& lock, const HoldPtr& hold);

  std::size_t active() const noexcept { return admitted_.size(); }  // leases and passes
  std::size_t leases() const noexcept { return admitted_.size() - passes_.size(); }
  // Returns an admitted hold on the layer whose load failed; null if no load of it failed.
  const Hold* failed(const Lock&, const Layer& layer) const;

 private:
  bool fits(const Lock& lock, const Hold& hold) const;
  bool nested(const Hold& hold) const;
  bool would_deadlock() const;

  Books& books_;
  std::vector<Hold*> admitted_;
  std::vector<HoldPtr> passes_;  // also in admitted_; about one per computing thread
  std::list<HoldPtr> line_;
};

}  // namespace warmserve
