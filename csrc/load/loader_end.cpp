// The ends of a load: completion, failure and undoing.
#include <utility>

#include "load/loader.h"

namespace warmserve {

using enum Residency;

void Loader::complete_if_all_arrived(const Lock& lock, LayerLoad& load) {
  if (load.complete()) complete(lock, load);
}

// Accounts for bytes that have arrived. Completes the load with the last ones.
void Loader::arrived(const Lock& lock, LayerLoad& load, std::uint64_t bytes) {
  load.in_flight -= bytes;
  state_.wake();
  if (load.failed()) return;
  load.done += bytes;
  for (const TicketPtr& ticket : load.tickets) ticket->bytes_done += bytes;
  complete_if_all_arrived(lock, load);
}

// Drains the layer to absent. Then a load without tickets ends; a load with tickets is queued
// again.
void Loader::undo(Lock& lock, LayerLoad& load) {
  if (load.to_host)
    return load.tickets.empty() ? queue_.erase(lock, load) : start_again(lock, load);
  Layer& layer = *load.layer;
  if (layer.residency == filling) state_.transition(lock, layer, draining);
  layer.unmap_failed = true;
  EvictionOrder::update(layer);
  state_.mark_busy(lock, layer);
  load.phase = Phase::undoing;
  queue_.relist(lock, load);
  std::vector<GranuleId> freed;
  try {
    drain_and_unmap(state_, lock, {&layer}, kNever, nullptr, freed);
  } catch (...) {
    fail(lock, load, std::current_exception());
  }
  state_.arena.give(freed);
  if (load.tickets.empty()) return queue_.erase(lock, load);
  start_again(lock, load);
}

void Loader::start_again(const Lock& lock, LayerLoad& load) {
  for (const TicketPtr& ticket : load.tickets) ticket->bytes_done -= load.done;
  load.restart();
  queue_.relist(lock, load);
}

void Loader::complete(const Lock& lock, LayerLoad& load) {
  Layer& layer = *load.layer;
  const std::vector<TicketPtr> tickets = queue_.release(lock, load);
  if (!load.to_host && layer.residency == filling) {
    layer.filled_at = ++state_.clock;
    state_.transition(lock, layer, resident);
    if (!load.remembered) state_.counters.bytes_loaded += layer.bytes;
    ++state_.counters.layers_loaded;
    state_.arena.remember(layer.key, layer.granules);
  }
  const std::uint64_t spared = load.span - load.done;  // of a layer whose drain failed
  queue_.erase(lock, load);
  for (const TicketPtr& ticket : tickets) {
    ticket->bytes_done += spared;
    if (ticket->loads.empty()) finish_ticket(lock, ticket);
  }
}

// Has the load undone once it is idle.
void Loader::abandon(const Lock& lock, LayerLoad& load, Verdict why) {
  load.abandon(why);
  queue_.relist(lock, load);
}

// Ends the tickets of the load with the error. Tickets that join later do not see it; the load
// starts again for them.
void Loader::fail(const Lock& lock, LayerLoad& load, std::exception_ptr error) {
  abandon(lock, load, Verdict::failed);
  for (const TicketPtr& ticket : queue_.release(lock, load)) drop(lock, ticket, error);
}

// Handles an error of work that was started for `generation`. Tickets that joined later do not see
// the error; the work is redone for them.
void Loader::on_error(const Lock& lock, LayerLoad& load, unsigned generation,
                      std::exception_ptr error) {
  if (generation == load.generation)
    fail(lock, load, error);
  else
    abandon(lock, load, Verdict::failed);
}

}  // namespace warmserve
