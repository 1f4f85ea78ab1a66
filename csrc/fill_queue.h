// Which layers are wanted, by whom, and whose turn it is.
//
// A Fill is one layer's journey to resident, shared by every ticket that wants it. Higher priority
// goes first, then the earlier deadline, then who asked first; a fill takes the place of the most
// urgent of its tickets. Foreground work leaves the background a share of the bytes, and no more.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "ticket.h"

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
  enum class Next { start, copy, undo, none };  // what a loader can do for it

  Layer* layer;
  ModelPtr model;      // keeps the layer
  std::uint64_t span;  // bytes to write: whole granules, so that nothing of an earlier tenant stays
  Rank rank;
  std::vector<TicketPtr> tickets{};  // none: nobody wants it any more
  unsigned generation = 0;           // counts how often somebody wanted it whom nobody had before
  Phase phase = Phase::queued;
  bool give_way = false;        // its granules are wanted by a fill before it: start again later
  bool failed = false;          // what was copied is not to be used
  bool mapped = false;          // behind the layer's addresses; copies go another way
  std::uint64_t begin = 0;      // first byte not handed to a loader
  std::uint64_t sent = 0;       // bytes whose copies are under way or over
  std::uint64_t done = 0;       // bytes arrived
  std::uint64_t in_flight = 0;  // bytes handed to loaders and not arrived
  unsigned hands = 0;           // loaders that are at a chunk of it
  std::vector<std::uint64_t> sums{};  // of the layer's digests, over the bytes sent; see digests.h
  Next listed = Next::none;           // FillQueue's: the list that it is in

  // The first of them. Pre-condition: there is one.
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

// Everything under the runtime's lock.
class FillQueue {
 public:
  // `share`, 0 to 1: of the bytes handed out while foreground work waits.
  FillQueue(Books& books, double share) : books_(books), share_(share) {}

  // Adds the ticket to the fills of what is missing of the layers it wants.
  void enlist(const Lock& lock, const TicketPtr& ticket);
  // Ends the ticket with `why`; layers that nobody else wants are given up, those arrived stay.
  void drop(const Lock& lock, const TicketPtr& ticket, std::exception_ptr why);
  // Gives up these layers; tickets that wait for others too go on to those.
  void drop_layers(const Lock& lock, const Selection& selection, std::exception_ptr why);
  // Takes a fill from its tickets, which are its no more.
  std::vector<TicketPtr> release(const Lock& lock, Fill& fill);
  void forget(const Lock&, Fill& fill);

  // Drops the tickets whose deadline has passed.
  void expire(const Lock& lock);
  Deadline next_deadline() const { return deadlines_.empty() ? kNever : deadlines_.begin()->first; }

  // Moves the fill to the list for its next(). A caller that changes the fill's phase, bytes, flags
  // or tickets must call this before it drops the lock.
  void relist(const Lock&, Fill& fill);

  void handed_out(const Lock&, const Fill& fill, std::uint64_t bytes);
  enum class Visited { worked, cannot, no_room };
  // Calls visit(fill) for those fills that a loader can do something for, in order, until one
  // worked. After no_room no other fill is started. Fills that only wait are not looked at.
  template <typename Visit>
  bool serve(const Lock& lock, std::uint64_t chunk, Visit visit);

  // Throws general if a fill is not in the list where it belongs.
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
  // The first fill behind `before` that has a turn; null: none.
  Fill* first_behind(const std::optional<Rank>& before, const Turn& turn, bool may_start) const;
  template <typename Visit>
  bool pass(const Turn& turn, Visit visit);

  Books& books_;
  const double share_;
  std::map<Rank, std::unique_ptr<Fill>> order_;
  std::array<List, 3> lists_;  // of `order_`, by what can be done next
  std::multimap<Deadline, std::weak_ptr<Ticket>> deadlines_;
  std::uint64_t sequence_ = 0;
  double foreground_bytes_ = 0, background_bytes_ = 0;  // since foreground work came
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

// Foreground fills come first and may start, and so claim room, also when the next chunk is the
// background's; if that has none to copy, it is theirs all the same.
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
