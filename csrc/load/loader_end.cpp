// The ends of a fill: completion, failure and undoing.
#include <utility>

#include "load/loader.h"

namespace warmserve {

using enum Residency;

void Transfer::complete_if_all_is_there(const Lock& lock, Fill& fill) {
  if (fill.done == fill.span && fill.mapped && fill.idle() && !fill.failed) complete(lock, fill);
}

// Accounts for bytes that have arrived. Completes the fill with the last ones.
void Transfer::arrived(const Lock& lock, Fill& fill, std::uint64_t bytes) {
  fill.in_flight -= bytes;
  books_.wake();
  if (fill.failed) return;
  fill.done += bytes;
  for (const TicketPtr& ticket : fill.tickets) ticket->bytes_done += bytes;
  complete_if_all_is_there(lock, fill);
}

// Drains the layer to absent. Then a fill without tickets ends; a fill with tickets is queued
// again.
void Transfer::undo(Lock& lock, Fill& fill) {
  Layer& layer = *fill.layer;
  if (layer.residency == filling) books_.transition(lock, layer, draining);
  layer.torn = true;
  EvictionOrder::update(layer);
  books_.own(lock, layer);
  fill.phase = Phase::undoing;
  queue_.relist(lock, fill);
  std::vector<GranuleId> freed;
  try {
    drain(books_, lock, {&layer}, kNever, nullptr, freed);
  } catch (...) {
    fail(lock, fill, std::current_exception());
  }
  books_.arena.give(freed);
  if (fill.tickets.empty()) return queue_.forget(lock, fill);
  for (const TicketPtr& ticket : fill.tickets) ticket->bytes_done -= fill.done;
  fill.phase = Phase::queued;
  fill.begin = fill.sent = fill.done = 0;
  fill.sums.clear();
  fill.failed = fill.give_way = fill.mapped = false;
  queue_.relist(lock, fill);
}

void Transfer::complete(const Lock& lock, Fill& fill) {
  Layer& layer = *fill.layer;
  if (layer.residency == filling) {
    layer.filled_at = ++books_.clock;
    books_.transition(lock, layer, resident);
    books_.counters.bytes_loaded += layer.bytes;
    ++books_.counters.layers_loaded;
  }
  const std::vector<TicketPtr> tickets = queue_.release(lock, fill);
  const std::uint64_t spared = fill.span - fill.done;  // of a layer whose drain failed
  queue_.forget(lock, fill);
  for (const TicketPtr& ticket : tickets) {
    ticket->bytes_done += spared;
    if (ticket->fills.empty()) settle(lock, ticket);
  }
}

// Marks the copied bytes as unusable. The fill is undone once it is idle.
void Transfer::give_up(const Lock& lock, Fill& fill) {
  fill.failed = true;
  queue_.relist(lock, fill);
}

// Ends the tickets of the fill with the error. Tickets that join later do not see it; the fill
// starts again for them.
void Transfer::fail(const Lock& lock, Fill& fill, std::exception_ptr error) {
  give_up(lock, fill);
  for (const TicketPtr& ticket : queue_.release(lock, fill)) drop(lock, ticket, error);
}

// Handles an error of work that was started for `generation`. Tickets that joined later do not see
// the error; the work is redone for them.
void Transfer::meet(const Lock& lock, Fill& fill, unsigned generation, std::exception_ptr error) {
  if (generation == fill.generation)
    fail(lock, fill, error);
  else
    give_up(lock, fill);
}

}  // namespace warmserve
