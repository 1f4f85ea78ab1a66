// The states of all layers under one lock, their only transition function, and the choice of the
// layers to evict when memory is needed.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/eventfd.h"
#include "base/lock_mark.h"
#include "memory/arena.h"
#include "model/eviction_order.h"
#include "model/model.h"
#include "model/other_processes.h"

namespace warmserve {

// The runtime's lock, which only SharedState::lock() makes. A function that takes a const Lock&
// needs it held; one that takes a Lock& may also drop it. While a thread holds it, the thread is
// marked. A wait on a condition variable keeps the mark, because the thread calls nothing then.
class Lock : public std::unique_lock<std::mutex> {
 public:
  Lock(Lock&&) noexcept = default;
  ~Lock() {
    if (owns_lock()) LockMark::clear();
  }
  void lock() {
    std::unique_lock<std::mutex>::lock();
    LockMark::set();
  }
  void unlock() {
    LockMark::clear();
    std::unique_lock<std::mutex>::unlock();
  }

 private:
  friend class SharedState;
  explicit Lock(std::mutex& mutex) : std::unique_lock<std::mutex>(mutex) { LockMark::set(); }
};

struct Counters {
  std::uint64_t bytes_loaded = 0, layers_loaded = 0, layers_evicted = 0, chunks = 0;
  // Layers examined in searches for memory or work: a measure of their cost that needs no clock.
  std::uint64_t layers_examined = 0;
};

// The state of a runtime's models, under one lock, which is never held over a call that may block
// or over a driver call.
class SharedState {
 public:
  explicit SharedState(Arena& arena, bool fence_device = false)
      : arena(arena), fence_device(fence_device) {}

  Lock lock() { return Lock(mutex_); }

  Arena& arena;
  const bool fence_device;          // see RuntimeOptions
  std::condition_variable changed;  // callers wait here for tickets and layers
  std::condition_variable work;     // loader threads wait here for something to do
  std::uint64_t version = 0;  // incremented by wake(); a loader thread that missed one looks again
  void wake() {
    ++version;
    changed.notify_all();
    work.notify_all();
    changes.signal();
  }

  std::map<std::string, ModelPtr> models;
  std::uint64_t clock = 0;             // logical; orders uses
  std::unordered_set<Layer*> filling;  // layers in the state `filling`
  std::uint64_t busy_layers = 0;
  std::uint64_t held_granules = 0;     // granules of all held layers
  std::uint64_t granules_in_hand = 0;  // taken from the pool by a thread that trims it
  std::uint64_t held_by_clients = 0;   // leases that stand for the use of clients
  bool room_wanted = false;            // a load waits for layers to become evictable
  unsigned release_wanted = 0;         // evictions waiting for leases to end
  EventFd epochs;                      // signalled when a backing epoch has changed
  EventFd changes;                     // signalled by wake(), for a thread that waits on sockets
  std::shared_ptr<Clients> clients;    // of a broker
  Broker* broker = nullptr;            // of a client; set at construction
  std::vector<Layer*> given_up;        // revoked layers without holds, to be unmapped; busy
  Counters counters;

  std::vector<Holder> holders(const Lock&) const;

  // Changes a layer's residency; nothing else does. Throws general on an illegal transition.
  void transition(const Lock& lock, Layer& layer, Residency to) {
    transition_quietly(lock, layer, to);
    wake();
  }
  // The same for one of several layers, after which the caller calls wake() once: a wake of all
  // waiters for each layer would take longer than the change.
  void transition_quietly(const Lock&, Layer& layer, Residency to);

  // Protects layers from eviction for a lease or a pass, whether or not they are resident.
  void hold(const Lock&, const Selection& selection, bool pass);
  void unhold(const Lock&, const Selection& selection, bool pass);
  // Returns how many granules the selection's layers that no lease or pass holds need.
  std::uint64_t granules_to_hold(const Lock&, const Selection& selection) const;

  // Returns layers whose eviction frees at least `granules`, or none; see EvictionOrder.
  std::vector<Layer*> choose_victims(const Lock&, std::uint64_t granules,
                                     const EvictionOrder::Spared& spared, const Model* first);
  void set_keep_value(const Lock&, Layer& layer, double keep_value);
  // Marks the resident ones of the layers, which the broker wants back, as revoked. Such a layer
  // joins `given_up` when nothing holds it: now, or at the end of the last lease or pass. A layer
  // of `yielded` joins it now, although leases hold it that wait.
  void revoke(const Lock& lock, const Selection& selection, const LayerSet& yielded);
  // Set and clear Layer::busy.
  void mark_busy(const Lock&, Layer& layer);
  void mark_idle(const Lock&, Layer& layer);
  // Makes resident layers draining, and marks all the layers busy for the caller. Layers whose
  // unmapping failed are draining already.
  void claim(const Lock&, std::span<Layer* const> layers);

  // Checks all invariants of the state. Throws general, which names the broken one.
  void check_invariants(const Lock&) const;

 private:
  void give_up_revoked(const Lock& lock, Model& model, const LayerSet& yielded = {});
  std::mutex mutex_;
};

}  // namespace warmserve
