// The queue of layers to load, to the device or to the host cache, and its order.
//
// All tickets that want a layer share its load. Loads are ordered by higher priority, then earlier
// deadline, then earlier request; a load has the rank of its most urgent ticket. While foreground
// loads wait, background loads get a limited share of the bytes.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "load/layer_load.h"

namespace warmserve {

// All functions are called under the runtime's lock.
class LoadQueue {
 public:
  // `share`, in [0, 1]: the background's share of the bytes handed out while foreground work waits.
  LoadQueue(SharedState& state, double share) : state_(state), share_(share) {}

  // Adds the ticket to the loads of the layers that it wants and that are not resident.
  void add(const Lock& lock, const TicketPtr& ticket);
  // Adds the ticket to the load of a layer that it wants, that was resident, and that it has lost.
  void add_again(const Lock& lock, const TicketPtr& ticket, Layer& layer, const ModelPtr& model);
  // Ends the ticket with `why`. Layers that no other ticket wants are cancelled; layers that have
  // arrived stay.
  void drop(const Lock& lock, const TicketPtr& ticket, std::exception_ptr why);
  // Cancels the loads of these layers to the device, or with `to_host` to the host cache. Tickets
  // that also want other layers continue with those.
  void drop_layers(const Lock& lock, const Selection& selection, bool to_host,
                   std::exception_ptr why);
  // Detaches all tickets from the load and returns them.
  std::vector<TicketPtr> release(const Lock& lock, LayerLoad& load);
  // Removes the load from the queue and destroys it.
  void erase(const Lock&, LayerLoad& load);
  // Erases the loads to the host cache. Precondition: no ticket wants them, and all are idle.
  void erase_host_loads(const Lock& lock);

  // Drops the tickets whose deadline has passed.
  void expire(const Lock& lock);
  Deadline next_deadline() const { return deadlines_.empty() ? kNever : deadlines_.begin()->first; }

  // Moves the load to the list of its next(). Must be called before the lock is released by each
  // function that changes a field that next() depends on.
  void relist(const Lock&, LayerLoad& load);

  // Returns the granules that the queued loads need; these loads have none yet.
  std::uint64_t granules_queued(const Lock&) const;

  // Returns the loads whose next step this is, in order.
  std::vector<LayerLoad*> with_next(const Lock&, LayerLoad::Next next) const;
  // Counts bytes of the load that were handed to a loader.
  void handed_out(const Lock&, const LayerLoad& load, std::uint64_t bytes);
  enum class Visited { worked, cannot, no_room };
  // Calls visit(load) for the loads that a loader can do a step for, in order, until a visit
  // returns `worked`. After `no_room` no further load is started. Loads that only wait are not
  // visited. Returns whether a visit worked. `chunk`: bytes of the chunk to hand out next.
  template <typename Visit>
  bool serve(const Lock& lock, std::uint64_t chunk, Visit visit);

  // Throws general if a load is not in the list of its next(), or contradicts itself.
  void check_invariants(const Lock&) const;

 private:
  using List = std::map<Rank, LayerLoad*>;
  struct Turn {
    bool foreground_copies, background_works;
  };
  static constexpr Rank kFirstOfBackground{kBackground, Deadline::min(), 0};

  List& list(LayerLoad::Next next) { return lists_[static_cast<std::size_t>(next)]; }
  const List& list(LayerLoad::Next next) const { return lists_[static_cast<std::size_t>(next)]; }
  static LayerLoad*& load_of(Layer& layer, bool to_host) {
    return to_host ? layer.host_load : layer.load;
  }
  void unlist(LayerLoad& load);
  void join(const Lock& lock, const TicketPtr& ticket, Layer& layer, const ModelPtr& model);
  void rerank(LayerLoad& load);
  // Returns the first load behind `before` that has a turn; null if no load has one.
  LayerLoad* first_behind(const std::optional<Rank>& before, const Turn& turn,
                          bool may_start) const;
  template <typename Visit>
  bool pass(const Turn& turn, Visit visit);

  SharedState& state_;
  const double share_;
  std::map<Rank, std::unique_ptr<LayerLoad>> order_;
  std::array<List, 3> lists_;  // the loads of `order_`, by their next()
  std::multimap<Deadline, std::weak_ptr<Ticket>> deadlines_;
  std::uint64_t sequence_ = 0;
  double foreground_bytes_ = 0, background_bytes_ = 0;  // handed out since foreground work arrived
};

template <typename Visit>
bool LoadQueue::pass(const Turn& turn, Visit visit) {
  bool may_start = true;
  std::optional<Rank> before;
  while (LayerLoad* load = first_behind(before, turn, may_start)) {
    ++state_.counters.layers_examined;
    before = load->rank;
    switch (visit(*load)) {
      case Visited::worked: return true;
      case Visited::no_room: may_start = false; break;
      case Visited::cannot: break;
    }
  }
  return false;
}

// Foreground loads are served first. If the background is due, it gets the next chunk; foreground
// loads may still start, and so claim room, before it. If the background then has no chunk to copy,
// a foreground load copies one.
template <typename Visit>
bool LoadQueue::serve(const Lock&, std::uint64_t chunk, Visit visit) {
  if (order_.empty() || !order_.begin()->second->foreground()) {
    foreground_bytes_ = background_bytes_ = 0;
    return pass({true, true}, visit);
  }
  const double then = background_bytes_ + static_cast<double>(chunk);
  const bool background = !order_.rbegin()->second->foreground();
  const bool due = background && then <= share_ * (foreground_bytes_ + then);
  return (due && pass({false, true}, visit)) || pass({true, false}, visit);
}

}  // namespace warmserve
