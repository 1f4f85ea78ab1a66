// The queue of layers to load, and its order.
//
// A Fill is the load of one layer, from absent to resident. All tickets that want the layer share
// it. Fills are ordered by higher priority, then earlier deadline, then earlier request; a fill has
// the rank of its most urgent ticket. While foreground fills wait, background fills get a limited
// share of the bytes.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "load/ticket.h"

namespace warmserve {

struct Rank {
  int priority;
  Deadline deadline;
  std::uint64_t sequence;

  bool more_urgent_than(const Rank& other) const noexcept {
    return priority != other.priority ? priority > other.priority : deadline < other.deadline;
  }
  bool operator<(const Rank& other) const noexcept {
    return more_urgent_than(other) || (!other.more_urgent_than(*this) && sequence < other.sequence);
  }
};

struct Fill {
  enum class Phase { queued, starting, copying, undoing };
  enum class Next { start, copy, undo, none };  // the next step that a loader can do

  Layer* layer;
  ModelPtr model;      // keeps the layer alive
  std::uint64_t span;  // bytes to write: whole granules, to overwrite all bytes of earlier tenants
  Rank rank;
  std::vector<TicketPtr> tickets{};  // empty: the fill is unwanted
  unsigned generation = 0;           // incremented when the first ticket joins an unwanted fill
  Phase phase = Phase::queued;
  bool give_way = false;    // a more urgent fill needs its granules: undo, start again later
  bool failed = false;      // the copied bytes must not be used: undo
  bool mapped = false;      // granules are mapped at the layer's addresses; copies do not use those
  std::uint64_t begin = 0;  // first byte not handed to a loader
  std::uint64_t sent = 0;   // bytes whose copies are enqueued or complete
  std::uint64_t done = 0;   // bytes arrived
  std::uint64_t in_flight = 0;        // bytes handed to loaders that have not arrived
  unsigned hands = 0;                 // loaders that work on a chunk of the fill
  std::vector<std::uint64_t> sums{};  // of the layer's digests, over the bytes sent; see digests.h
  Next listed = Next::none;           // the list of FillQueue that contains the fill

  // Returns the ticket of the highest rank. Precondition: `tickets` is not empty.
  const TicketPtr& most_urgent() const;
  bool foreground() const noexcept { return rank.priority > kBackground; }
  bool unwanted() const noexcept { return failed || give_way || tickets.empty(); }
  bool idle() const noexcept { return in_flight == 0 && hands == 0; }
  Next next() const noexcept {
    if (phase == Phase::queued) return Next::start;
    if (phase != Phase::copying) return Next::none;
    if (unwanted()) return Next::undo;
    return begin < span ? Next::copy : Next::none;
  }
};

// All functions are called under the runtime's lock.
class FillQueue {
 public:
  // `share`, in [0, 1]: the background's share of the bytes handed out while foreground work waits.
  FillQueue(Books& books, double share) : books_(books), share_(share) {}

  // Adds the ticket to the fills of the layers that it wants and that are not resident.
  void enlist(const Lock& lock, const TicketPtr& ticket);
  // Ends the ticket with `why`. Layers that no other ticket wants are cancelled; layers that have
  // arrived stay.
  void drop(const Lock& lock, const TicketPtr& ticket, std::exception_ptr why);
  // Cancels the fills of these layers. Tickets that also want other layers continue with those.
  void drop_layers(const Lock& lock, const Selection& selection, std::exception_ptr why);
  // Detaches all tickets from the fill and returns them.
  std::vector<TicketPtr> release(const Lock& lock, Fill& fill);
  // Removes the fill from the queue and destroys it.
  void forget(const Lock&, Fill& fill);

  // Drops the tickets whose deadline has passed.
  void expire(const Lock& lock);
  Deadline next_deadline() const { return deadlines_.empty() ? kNever : deadlines_.begin()->first; }

  // Moves the fill to the list of its next(). Must be called before the lock is released by each
  // function that changes a field that next() depends on.
  void relist(const Lock&, Fill& fill);

  // Counts bytes of the fill that were handed to a loader.
  void handed_out(const Lock&, const Fill& fill, std::uint64_t bytes);
  enum class Visited { worked, cannot, no_room };
  // Calls visit(fill) for the fills that a loader can do a step for, in order, until a visit
  // returns `worked`. After `no_room` no further fill is started. Fills that only wait are not
  // visited. Returns whether a visit worked. `chunk`: bytes of the chunk to hand out next.
  template <typename Visit>
  bool serve(const Lock& lock, std::uint64_t chunk, Visit visit);

  // Throws general if a fill is not in the list of its next().
  void check_invariants(const Lock&) const;

 private:
  using List = std::map<Rank, Fill*>;
  struct Turn {
    bool foreground_copies, background_works;
  };
  static constexpr Rank kFirstOfBackground{kBackground, Deadline::min(), 0};

  List& list(Fill::Next next) { return lists_[static_cast<std::size_t>(next)]; }
  const List& list(Fill::Next next) const { return lists_[static_cast<std::size_t>(next)]; }
  void unlist(Fill& fill);
  void rerank(Fill& fill);
  // Returns the first fill behind `before` that has a turn; null if no fill has one.
  Fill* first_behind(const std::optional<Rank>& before, const Turn& turn, bool may_start) const;
  template <typename Visit>
  bool pass(const Turn& turn, Visit visit);

  Books& books_;
  const double share_;
  std::map<Rank, std::unique_ptr<Fill>> order_;
  std::array<List, 3> lists_;  // the fills of `order_`, by their next()
  std::multimap<Deadline, std::weak_ptr<Ticket>> deadlines_;
  std::uint64_t sequence_ = 0;
  double foreground_bytes_ = 0, background_bytes_ = 0;  // handed out since foreground work arrived
};

template <typename Visit>
bool FillQueue::pass(const Turn& turn, Visit visit) {
  bool may_start = true;
  std::optional<Rank> before;
  while (Fill* fill = first_behind(before, turn, may_start)) {
    ++books_.counters.layers_examined;
    before = fill->rank;
    switch (visit(*fill)) {
      case Visited::worked: return true;
      case Visited::no_room: may_start = false; break;
      case Visited::cannot: break;
    }
  }
  return false;
}

// Foreground fills are served first. If the background is due, it gets the next chunk; foreground
// fills may still start, and so claim room, before it. If the background then has no chunk to copy,
// a foreground fill copies one.
template <typename Visit>
bool FillQueue::serve(const Lock&, std::uint64_t chunk, Visit visit) {
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
