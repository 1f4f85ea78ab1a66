// The loads of a client: requests to the broker in place of copies.
#include <algorithm>
#include <numeric>

#include "load/loader.h"

namespace warmserve {

using enum Residency;

namespace {

// Layers of one model that one ticket wants.
struct Want {
  ModelPtr model;
  TicketPtr ticket;
  std::vector<LayerLoad*> loads;
};

WantOptions options_of(const Ticket& ticket) {
  return {.priority = ticket.priority,
          .lease = ticket.priority >= kForeground && ticket.deadline == kNever &&
                   !ticket.swapped_out && ticket.evict_below == kNoLimit,
          .deadline = ticket.deadline,
          .evict_below = ticket.evict_below,
          .swapped_out = ticket.swapped_out.get()};
}

}  // namespace

void Loader::ask_broker(const Lock& lock) {
  queue_.expire(lock);
  if (state_.broker->ask_later(lock)) return;
  std::vector<Want> wants;
  for (LayerLoad* load : queue_.with_next(lock, LayerLoad::Next::start)) {
    Layer& layer = *load->layer;
    if (layer.busy) continue;
    if (layer.residency == resident) {  // it was draining, and the drain failed
      complete(lock, *load);
      continue;
    }
    if (layer.residency != absent) continue;
    state_.transition(lock, layer, filling);
    if (load->span == 0) {
      complete(lock, *load);
      continue;
    }
    state_.mark_busy(lock, layer);
    load->phase = Phase::starting;
    queue_.relist(lock, *load);
    const TicketPtr& ticket = load->most_urgent();
    if (wants.empty() || wants.back().model != load->model || wants.back().ticket != ticket)
      wants.push_back({load->model, ticket, {}});
    wants.back().loads.push_back(load);
  }
  for (const Want& want : wants) send_want(lock, *want.model, *want.ticket, want.loads);
  for (LayerLoad* load : queue_.with_next(lock, LayerLoad::Next::undo)) {
    state_.broker->cancel(lock, load->request, *load->layer);
    load->request_cancelled = true;
    queue_.relist(lock, *load);
  }
}

void Loader::ask_for_lease(const Lock& lock, const Ticket& ticket) {
  if (!options_of(ticket).lease || state_.broker->ask_later(lock)) return;
  for (const Selection& wanted : ticket.wants) {
    std::vector<LayerLoad*> asked;
    wanted.for_each([&](const Layer& layer) {
      LayerLoad* const load = layer.load;
      if (load && load->phase == Phase::starting && !load->request_leases) asked.push_back(load);
    });
    if (!asked.empty()) send_want(lock, *wanted.model, ticket, asked);
  }
}

// Sends one request for loads of one model, which are starting.
void Loader::send_want(const Lock& lock, const Model& model, const Ticket& ticket,
                       const std::vector<LayerLoad*>& loads) {
  LayerSet layers;
  for (const LayerLoad* load : loads) layers.insert(load->layer->index);
  const WantOptions options = options_of(ticket);
  std::uint64_t request = 0;
  std::exception_ptr error;
  try {
    request = state_.broker->want(lock, model, layers, options);
  } catch (...) {
    error = std::current_exception();
  }
  // If the broker has ended just now, the loads are queued again, as by ask_again().
  const bool later = error && state_.broker->ask_later(lock);
  for (LayerLoad* load : loads) {
    load->request = request;
    load->request_leases = options.lease;
    load->request_cancelled = later;
    if (error) refuse(lock, *load->layer, request, error);
  }
}

std::vector<std::uint32_t> Loader::arrive(Lock& lock, Model& model,
                                          std::span<const Arrival> arrivals) {
  std::vector<std::uint32_t> unwanted;
  std::vector<Layer*> layers;
  std::vector<const Arrival*> wanted;
  for (const Arrival& arrival : arrivals) {
    Layer* const layer =
        arrival.layer < model.layers.size() ? &model.layers[arrival.layer] : nullptr;
    if (!layer || !layer->load || layer->load->phase != Phase::starting) {
      unwanted.push_back(arrival.layer);
      continue;
    }
    const std::size_t count = arrival.granules.size();
    if (count != layer->granules_needed || count > state_.arena.free_count())
      throw Error(ErrorKind::general, "the broker maps " + std::to_string(count) +
                                          " granules for a layer of " +
                                          std::to_string(layer->granules_needed));
    layer->granules = state_.arena.take(static_cast<std::uint32_t>(count));
    layers.push_back(layer);
    wanted.push_back(&arrival);
  }
  lock.unlock();
  std::exception_ptr error;
  try {
    for (std::size_t i = 0; i < layers.size(); ++i)
      for (std::size_t j = 0; j < layers[i]->granules.size(); ++j)
        state_.arena.import(layers[i]->granules[j], wanted[i]->granules[j]);
    map_layers(state_.arena, layers);
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  // After an error, layers that are mapped may have no access.
  for (Layer* layer : layers) end_arrival(lock, *layer->load, error);
  return unwanted;
}

// Completes a load whose layer was mapped, or undoes it after an error.
void Loader::end_arrival(Lock& lock, LayerLoad& load, std::exception_ptr error) {
  state_.mark_idle(lock, *load.layer);
  load.request = 0;
  load.phase = Phase::copying;
  queue_.relist(lock, load);
  if (error) {
    fail(lock, load, error);
    undo(lock, load);
    return;
  }
  load.phase = Phase::arriving;
  load.begin = load.sent = load.done = load.span;
  queue_.relist(lock, load);
  for (const TicketPtr& ticket : load.tickets) ticket->bytes_done += load.span;
  complete(lock, load);
}

void Loader::refuse(const Lock& lock, Layer& layer, std::uint64_t request,
                    std::exception_ptr error) {
  LayerLoad* const load = layer.load;
  if (!load || load->phase != Phase::starting || load->request != request) return;
  state_.transition(lock, layer, draining);
  state_.transition(lock, layer, absent);
  state_.mark_idle(lock, layer);
  load->phase = Phase::undoing;
  queue_.relist(lock, *load);
  // A request that we cancelled ends with an error that means nothing to tickets that joined later.
  if (!load->request_cancelled) fail(lock, *load, error);
  if (load->tickets.empty())
    queue_.erase(lock, *load);
  else
    start_again(lock, *load);
}

void Loader::ask_again(const Lock& lock) {
  for (Layer* layer : std::vector<Layer*>(state_.filling.begin(), state_.filling.end())) {
    LayerLoad* const load = layer->load;
    if (!load || load->phase != Phase::starting) continue;
    load->request_cancelled = true;  // then its end is no error for the tickets
    refuse(lock, *layer, load->request, nullptr);
  }
}

void Loader::refuse_all(const Lock& lock, std::exception_ptr error) {
  for (Layer* layer : std::vector<Layer*>(state_.filling.begin(), state_.filling.end()))
    if (layer->load && layer->load->phase == Phase::starting)
      refuse(lock, *layer, layer->load->request, error);
}

}  // namespace warmserve
