// Which layers are where, under one lock: the states, their one transition function, and the order
// in which layers go when room is needed.
#pragma once

#include <condition_variable>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/eventfd.h"
#include "memory/arena.h"
#include "model/eviction_order.h"
#include "model/model.h"

namespace warmserve {

// Passed to every function that needs the runtime's lock held.
using Lock = std::unique_lock<std::mutex>;

struct Counters {
  std::uint64_t bytes_loaded = 0, layers_loaded = 0, layers_evicted = 0, chunks = 0;
  // How often a layer was looked at while room or work was searched: what that costs, without a
  // clock.
  std::uint64_t layers_examined = 0;
};

// A runtime's books. One lock over all of them; it is never held over a call that may block.
class Books {
 public:
  explicit Books(Arena& arena) : arena(arena) {}

  Arena& arena;
  std::mutex mutex;
  std::condition_variable changed;  // callers wait here for tickets and layers
  std::condition_variable work;     // loaders wait here for something to do
  std::uint64_t version = 0;        // counts wakes: what was looked at before one may be old
  void wake() {
    ++version;
    changed.notify_all();
    work.notify_all();
  }

  std::map<std::string, ModelPtr> models;
  std::uint64_t clock = 0;             // logical; orders uses
  std::unordered_set<Layer*> filling;  // layers in that state
  std::uint64_t owned_layers = 0;
  std::uint64_t held_granules = 0;     // of all layers with holds
  std::uint64_t granules_in_hand = 0;  // taken from the pool by a thread that is trimming it
  bool room_wanted = false;            // a fill waits for layers to become evictable
  unsigned release_wanted = 0;         // evictions that wait for leases to end
  EventFd epochs;                      // signalled when a backing epoch has changed
  Counters counters;

  std::vector<Holder> holders(const Lock&) const;

  // The only place where a layer's residency changes. Throws general on a step that is none.
  void transition(const Lock&, Layer& layer, Residency to);

  // Keeps layers from eviction for a lease or a pass, whether or not they have arrived.
  void hold(const Lock&, const Selection& selection, bool pass);
  void unhold(const Lock&, const Selection& selection, bool pass);
  // Granules of the layers that nobody holds yet.
  std::uint64_t granules_to_hold(const Lock&, const Selection& selection) const;

  // Layers to evict so that `granules` come free; see EvictionOrder.
  std::vector<Layer*> choose_victims(const Lock&, std::uint64_t granules,
                                     const EvictionOrder::Spared& spared, const Model* first);
  void stamp(const Lock&, Layer& layer, double keep_value);
  // Marks that a thread works on the layer between two holds of the lock, or does no more.
  void own(const Lock&, Layer& layer);
  void disown(const Lock&, Layer& layer);
  // From resident (or torn) to draining, owned by the caller.
  void claim(const Lock&, std::span<Layer* const> layers);

  // Throws general, naming what is wrong.
  void check_invariants(const Lock&) const;
};

}  // namespace warmserve
