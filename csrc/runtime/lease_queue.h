// The admission of leases and passes to layers, in order of arrival.
//
// A lease is admitted when its layers fit the arena together with all layers already held. From
// then on its layers are not evicted, and the missing ones are loaded. An admitted lease therefore
// always gets its layers, unless the device or a file fails. A lease that does not fit waits in the
// queue. Only two kinds of lease are admitted ahead of the queue: a lease on layers that its owner
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

// One lease; also one pass, which holds layers like a lease. Guarded by the runtime's lock.
struct Lease {
  std::vector<Selection> wants;  // each model once
  std::uint64_t owner = 0;       // thread or task; an owner that waits is taken to release nothing
  bool admitted = false;         // its layers count as held
  TicketPtr entry;               // done on admission; null: admitted at once
  TicketPtr ticket;  // loads the layers missing on admission; null: no layer was missing
  std::map<const Model*, LayerSet> ordered;  // layers that await_layer() has waited for
  bool used_early = false;  // its layers may be used before all of them are resident
  std::size_t slot = 0;     // index in LeaseQueue::admitted_
  bool pass = false;
  unsigned depth = 0;                 // of a pass: nested begins that have not ended
  std::vector<TicketPtr> arriving{};  // of a pass: loads of layers that its streams wait for

  bool wants_layer(const Layer& layer) const noexcept {
    return warmserve::wants_layer(wants, layer);
  }
};
using LeasePtr = std::shared_ptr<Lease>;

// Returns "lease on 'a', 'b'", for messages.
std::string lease_on(const std::vector<Selection>& wants);
// Returns "'a' is leased" or the equivalent for a pass, for messages.
std::string why_busy(const Model& model);

class LeaseQueue {
 public:
  explicit LeaseQueue(SharedState& state) : state_(state) {}

  // All functions are called under the runtime's lock.

  // Admits the lease if it fits and no lease waits, or if its owner already holds all its
  // layers. Returns whether it was admitted. Wait-free.
  bool try_admit(const Lock& lock, const LeasePtr& lease);
  // Admits a lease unconditionally. Precondition: its layers fit, or other leases hold them.
  // Wait-free.
  void admit(const Lock& lock, const LeasePtr& lease);
  // Adds a lease to the queue. Throws out_of_device_memory if it exceeds the arena, busy if the
  // waiting owners would then wait for each other for ever.
  void add_waiter(const Lock& lock, const LeasePtr& lease);
  // Begins a pass of the owner, or a nested part of the pass that the owner is in. Returns null if
  // no lease is on the model. Wait-free.
  LeasePtr begin_pass(const Lock& lock, const ModelPtr& model, std::uint64_t owner);
  // Adds a leased layer to a pass.
  void extend(const Lock& lock, Lease& pass, const Layer& layer);
  // Returns whether the owner is inside a pass that holds any of these layers.
  bool in_pass(const Lock&, const Selection& selection, std::uint64_t owner) const;
  // Admits the first waiting lease and returns it. Returns null if no lease waits or the first does
  // not fit.
  LeasePtr admit_next(const Lock& lock);
  // Removes the waiting leases that want the model and returns them.
  std::vector<LeasePtr> cancel_waiters(const Lock& lock, const ModelPtr& model);
  // Returns how many leases wait before this one.
  std::size_t ahead_of(const Lock& lock, const LeasePtr& lease) const;
  // Removes a waiting lease from the queue, or releases the layers of an admitted one.
  void remove(const Lock& lock, const LeasePtr& lease);

  bool any_waits() const noexcept { return !waiting_.empty(); }
  std::size_t active() const noexcept { return admitted_.size(); }  // leases and passes
  std::size_t leases() const noexcept { return admitted_.size() - passes_.size(); }
  // Says that a caller may use the layer now, although its leases may still wait for others.
  void use_early(const Lock&, const Layer& layer);
  // Returns the tickets of the leases that hold the layer and still wait for other layers, so that
  // nothing uses it; none if anything else holds it.
  std::vector<TicketPtr> waiting_for(const Lock&, const Layer& layer) const;
  // Returns an admitted lease on the layer whose load failed; null if no load of it failed.
  const Lease* failed(const Lock&, const Layer& layer) const;

 private:
  bool fits(const Lock& lock, const Lease& lease) const;
  bool nested(const Lease& lease) const;
  bool would_deadlock() const;

  SharedState& state_;
  std::vector<Lease*> admitted_;
  std::vector<LeasePtr> passes_;  // also in admitted_; about one per computing thread
  std::list<LeasePtr> waiting_;
};

}  // namespace warmserve
