// Tickets: a caller's handle to work in progress.
#pragma once

#include <exception>
#include <limits>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "load/waker.h"
#include "model/state.h"

namespace warmserve {

constexpr int kBackground = 0, kForeground = 100;
constexpr double kNoLimit = std::numeric_limits<double>::infinity();  // of keep values

bool wants_layer(const std::vector<Selection>& wants, const Layer& layer) noexcept;

// All functions and fields are used under the runtime's lock.
class Ticket {
 public:
  Ticket(std::string what, int priority, std::vector<Selection> wants, Deadline deadline = kNever,
         double evict_below = kNoLimit, bool to_host = false)
      : what(std::move(what)),
        priority(priority),
        deadline(deadline),
        evict_below(evict_below),
        to_host(to_host),
        wants(std::move(wants)) {}
  Ticket(const Ticket&) = delete;

  const std::string what;  // for messages: "prewarm of 'chat'"
  const int priority;
  const Deadline deadline;             // cancelled at this time
  const double evict_below;            // layers of this keep value or more are not evicted for it
  const bool to_host;                  // the layers are loaded to the host cache only
  const std::vector<Selection> wants;  // the layers to load
  std::uint64_t bytes_total = 0, bytes_done = 0;
  std::unordered_set<LayerLoad*> loads;  // not complete yet
  ModelPtr swapped_out;  // evicted as room is needed, and completely before the ticket is done
  std::exception_ptr
      partial_error;  // why some layers were cancelled while the others are still loaded
  bool done = false;
  std::exception_ptr error;  // of a done ticket

  bool wants_layer(const Layer& layer) const noexcept {
    return warmserve::wants_layer(wants, layer);
  }
  bool wants_all_of(const Model& model) const noexcept {
    for (const Selection& wanted : wants)
      if (wanted.whole && wanted.model.get() == &model) return true;
    return false;
  }
  // Marks the ticket done, with the error `why` if it is not null, and wakes all waiters.
  void finish(SharedState& state, const Lock&, std::exception_ptr why = nullptr);
  // Returns a descriptor, owned by the ticket, that becomes readable when the ticket is done.
  int fileno(const Lock&);
  // Wakes the token when the ticket is done, if the waker is still alive then. Returns false if the
  // ticket is done already.
  bool notify(const Lock&, const std::shared_ptr<Waker>& waker, std::uint64_t token);

 private:
  EventFd eventfd_;
  std::vector<std::pair<std::weak_ptr<Waker>, std::uint64_t>> listeners_;
};
using TicketPtr = std::shared_ptr<Ticket>;

}  // namespace warmserve
