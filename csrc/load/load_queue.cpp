#include "load/load_queue.h"

#include <utility>

namespace warmserve {

void LoadQueue::add(const Lock& lock, const TicketPtr& ticket) {
  if (ticket->deadline != kNever) deadlines_.emplace(ticket->deadline, ticket);
  for (const Selection& wanted : ticket->wants)
    wanted.for_each([&](Layer& layer) {
      const bool to_host = ticket->to_host;
      if (to_host ? layer.image || !layer.bytes : layer.residency == Residency::resident) return;
      join(lock, ticket, layer, wanted.model);
    });
}

void LoadQueue::add_again(const Lock& lock, const TicketPtr& ticket, Layer& layer,
                          const ModelPtr& model) {
  const std::uint64_t span = layer.granules_needed * state_.arena.granule_bytes();
  // join() counts the layer again. The ticket has not counted a layer that was resident before it.
  if (ticket->bytes_done >= span) {
    ticket->bytes_total -= span;
    ticket->bytes_done -= span;
  }
  join(lock, ticket, layer, model);
}

// Adds the ticket to the layer's load, which is made if there is none.
void LoadQueue::join(const Lock& lock, const TicketPtr& ticket, Layer& layer,
                     const ModelPtr& model) {
  LayerLoad*& slot = load_of(layer, ticket->to_host);
  if (!slot) {
    const std::uint64_t span =
        ticket->to_host ? layer.bytes : layer.granules_needed * state_.arena.granule_bytes();
    const Rank rank{ticket->priority, ticket->deadline, sequence_++};
    auto made = std::make_unique<LayerLoad>(LayerLoad{&layer, model, span, rank, ticket->to_host});
    slot = made.get();
    order_.emplace(rank, std::move(made));
  }
  LayerLoad& load = *slot;
  if (load.tickets.empty()) ++load.generation;
  load.tickets.push_back(ticket);
  rerank(load);
  relist(lock, load);
  ticket->loads.insert(&load);
  ticket->bytes_total += load.span;
  ticket->bytes_done += load.done;
}

// A load that has become more urgent is placed behind the loads that already have that urgency, so
// that the layers of one ticket keep their order.
void LoadQueue::rerank(LayerLoad& load) {
  if (load.tickets.empty()) return;
  const TicketPtr& ticket = load.most_urgent();
  Rank rank{ticket->priority, ticket->deadline, load.rank.sequence};
  if (!(rank < load.rank) && !(load.rank < rank)) return;
  if (rank < load.rank) rank.sequence = sequence_++;
  unlist(load);
  auto node = order_.extract(load.rank);
  node.key() = load.rank = rank;
  order_.insert(std::move(node));
}

void LoadQueue::drop(const Lock& lock, const TicketPtr& ticket, std::exception_ptr why) {
  for (LayerLoad* load : std::exchange(ticket->loads, {})) {
    std::erase(load->tickets, ticket);
    if (load->tickets.empty() && load->phase == LayerLoad::Phase::queued) {
      erase(lock, *load);
      continue;
    }
    rerank(*load);
    relist(lock, *load);
  }
  ticket->finish(state_, lock, why);
}

void LoadQueue::drop_layers(const Lock& lock, const Selection& selection, bool to_host,
                            std::exception_ptr why) {
  selection.for_each([&](Layer& layer) {
    LayerLoad* const load = load_of(layer, to_host);
    if (!load) return;
    for (const TicketPtr& ticket : release(lock, *load)) {
      ticket->partial_error = why;
      ticket->bytes_total -= load->span;
      ticket->bytes_done -= load->done;
      if (ticket->loads.empty()) ticket->finish(state_, lock, why);
    }
    if (load->phase == LayerLoad::Phase::queued) erase(lock, *load);
  });
  state_.wake();
}

std::vector<TicketPtr> LoadQueue::release(const Lock& lock, LayerLoad& load) {
  std::vector<TicketPtr> tickets = std::exchange(load.tickets, {});
  for (const TicketPtr& ticket : tickets) ticket->loads.erase(&load);
  relist(lock, load);
  return tickets;
}

void LoadQueue::erase(const Lock&, LayerLoad& load) {
  load_of(*load.layer, load.to_host) = nullptr;
  unlist(load);
  order_.erase(load.rank);
}

void LoadQueue::erase_host_loads(const Lock& lock) {
  std::vector<LayerLoad*> loads;
  for (const auto& [rank, load] : order_)
    if (load->to_host) loads.push_back(load.get());
  for (LayerLoad* load : loads) erase(lock, *load);
}

void LoadQueue::expire(const Lock& lock) {
  if (deadlines_.empty()) return;
  const Deadline now = Clock::now();
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    const TicketPtr ticket = deadlines_.begin()->second.lock();
    deadlines_.erase(deadlines_.begin());
    if (ticket && !ticket->done)
      drop(lock, ticket,
           std::make_exception_ptr(
               Error(ErrorKind::timeout, ticket->what + " was not done by its deadline")));
  }
}

void LoadQueue::unlist(LayerLoad& load) {
  if (load.listed != LayerLoad::Next::none) list(load.listed).erase(load.rank);
  load.listed = LayerLoad::Next::none;
}

void LoadQueue::relist(const Lock&, LayerLoad& load) {
#ifndef NDEBUG
  load.check();
#endif
  if (load.listed == load.next()) return;
  unlist(load);
  load.listed = load.next();
  if (load.listed != LayerLoad::Next::none) list(load.listed).emplace(load.rank, &load);
}

std::uint64_t LoadQueue::granules_queued(const Lock&) const {
  std::uint64_t granules = 0;
  for (const auto& [rank, load] : list(LayerLoad::Next::start))
    if (!load->to_host) granules += load->layer->granules_needed;
  return granules;
}

std::vector<LayerLoad*> LoadQueue::with_next(const Lock&, LayerLoad::Next next) const {
  std::vector<LayerLoad*> loads;
  for (const auto& [rank, load] : list(next)) loads.push_back(load);
  return loads;
}

LayerLoad* LoadQueue::first_behind(const std::optional<Rank>& before, const Turn& turn,
                                   bool may_start) const {
  LayerLoad* first = nullptr;
  const auto consider = [&](const List& list, bool only_background, bool only_foreground) {
    auto at = before ? list.upper_bound(*before) : list.begin();
    if (only_background && (!before || *before < kFirstOfBackground))
      at = list.lower_bound(kFirstOfBackground);
    if (at == list.end() || (only_foreground && !at->second->foreground())) return;
    if (!first || at->first < first->rank) first = at->second;
  };
  if (may_start) consider(list(LayerLoad::Next::start), false, !turn.background_works);
  consider(list(LayerLoad::Next::copy), !turn.foreground_copies, !turn.background_works);
  consider(list(LayerLoad::Next::undo), false, false);
  return first;
}

void LoadQueue::check_invariants(const Lock&) const {
  std::size_t listed = 0;
  for (const auto& [rank, load] : order_) {
    load->check();
    listed += load->listed != LayerLoad::Next::none;
    const bool found = load->listed == LayerLoad::Next::none || list(load->listed).contains(rank);
    if (load->listed != load->next() || !found)
      throw Error(ErrorKind::general, "invariant: a load of '" + load->model->name +
                                          "' is not in the list of its next step");
  }
  for (const List& list : lists_) listed -= list.size();
  if (listed) throw Error(ErrorKind::general, "invariant: a list contains loads that have ended");
}

void LoadQueue::handed_out(const Lock&, const LayerLoad& load, std::uint64_t bytes) {
  (load.foreground() ? foreground_bytes_ : background_bytes_) += static_cast<double>(bytes);
}

}  // namespace warmserve
