#include "load/load_queue.h"

#include <algorithm>
#include <utility>

namespace warmserve {

void FillQueue::enlist(const Lock& lock, const TicketPtr& ticket) {
  if (ticket->deadline != kNever) deadlines_.emplace(ticket->deadline, ticket);
  for (const Selection& wanted : ticket->wants)
    wanted.for_each([&](Layer& layer) {
      if (layer.residency == Residency::resident) return;
      if (!layer.fill) {
        const Rank rank{ticket->priority, ticket->deadline, sequence_++};
        auto made = std::make_unique<Fill>(
            Fill{&layer, wanted.model, layer.granules_needed * books_.arena.granule_bytes(), rank});
        layer.fill = made.get();
        order_.emplace(rank, std::move(made));
      }
      Fill& fill = *layer.fill;
      if (fill.tickets.empty()) ++fill.generation;
      fill.tickets.push_back(ticket);
      rerank(fill);
      relist(lock, fill);
      ticket->fills.insert(&fill);
      ticket->bytes_total += fill.span;
      ticket->bytes_done += fill.done;
    });
}

const TicketPtr& Fill::most_urgent() const {
  const auto rank_of = [](const TicketPtr& ticket) {
    return Rank{ticket->priority, ticket->deadline, 0};
  };
  return *std::min_element(tickets.begin(), tickets.end(),
                           [&](const auto& a, const auto& b) { return rank_of(a) < rank_of(b); });
}

// A fill that has become more urgent is placed behind the fills that already have that urgency, so
// that the layers of one ticket keep their order.
void FillQueue::rerank(Fill& fill) {
  if (fill.tickets.empty()) return;
  const TicketPtr& ticket = fill.most_urgent();
  Rank rank{ticket->priority, ticket->deadline, fill.rank.sequence};
  if (!(rank < fill.rank) && !(fill.rank < rank)) return;
  if (rank < fill.rank) rank.sequence = sequence_++;
  unlist(fill);
  auto node = order_.extract(fill.rank);
  node.key() = fill.rank = rank;
  order_.insert(std::move(node));
}

void FillQueue::drop(const Lock& lock, const TicketPtr& ticket, std::exception_ptr why) {
  for (Fill* fill : std::exchange(ticket->fills, {})) {
    std::erase(fill->tickets, ticket);
    if (fill->tickets.empty() && fill->phase == Fill::Phase::queued) {
      forget(lock, *fill);
      continue;
    }
    rerank(*fill);
    relist(lock, *fill);
  }
  ticket->finish(books_, lock, why);
}

void FillQueue::drop_layers(const Lock& lock, const Selection& selection, std::exception_ptr why) {
  selection.for_each([&](Layer& layer) {
    if (!layer.fill) return;
    for (const TicketPtr& ticket : release(lock, *layer.fill)) {
      ticket->short_of = why;
      ticket->bytes_total -= layer.fill->span;
      ticket->bytes_done -= layer.fill->done;
      if (ticket->fills.empty()) ticket->finish(books_, lock, why);
    }
    if (layer.fill->phase == Fill::Phase::queued) forget(lock, *layer.fill);
  });
  books_.wake();
}

std::vector<TicketPtr> FillQueue::release(const Lock& lock, Fill& fill) {
  std::vector<TicketPtr> tickets = std::exchange(fill.tickets, {});
  for (const TicketPtr& ticket : tickets) ticket->fills.erase(&fill);
  relist(lock, fill);
  return tickets;
}

void FillQueue::forget(const Lock&, Fill& fill) {
  fill.layer->fill = nullptr;
  unlist(fill);
  order_.erase(fill.rank);
}

void FillQueue::expire(const Lock& lock) {
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

void FillQueue::unlist(Fill& fill) {
  if (fill.listed != Fill::Next::none) list(fill.listed).erase(fill.rank);
  fill.listed = Fill::Next::none;
}

void FillQueue::relist(const Lock&, Fill& fill) {
  if (fill.listed == fill.next()) return;
  unlist(fill);
  fill.listed = fill.next();
  if (fill.listed != Fill::Next::none) list(fill.listed).emplace(fill.rank, &fill);
}

Fill* FillQueue::first_behind(const std::optional<Rank>& before, const Turn& turn,
                              bool may_start) const {
  Fill* first = nullptr;
  const auto consider = [&](const List& list, bool only_background, bool only_foreground) {
    auto at = before ? list.upper_bound(*before) : list.begin();
    if (only_background && (!before || *before < kFirstOfBackground))
      at = list.lower_bound(kFirstOfBackground);
    if (at == list.end() || (only_foreground && !at->second->foreground())) return;
    if (!first || at->first < first->rank) first = at->second;
  };
  if (may_start) consider(list(Fill::Next::start), false, !turn.background_works);
  consider(list(Fill::Next::copy), !turn.foreground_copies, !turn.background_works);
  consider(list(Fill::Next::undo), false, false);
  return first;
}

void FillQueue::check_invariants(const Lock&) const {
  std::size_t listed = 0;
  for (const auto& [rank, fill] : order_) {
    listed += fill->listed != Fill::Next::none;
    const bool found = fill->listed == Fill::Next::none || list(fill->listed).contains(rank);
    if (fill->listed != fill->next() || !found)
      throw Error(ErrorKind::general, "invariant: a fill of '" + fill->model->name +
                                          "' is not in the list of its next step");
  }
  for (const List& list : lists_) listed -= list.size();
  if (listed) throw Error(ErrorKind::general, "invariant: a list contains fills that have ended");
}

void FillQueue::handed_out(const Lock&, const Fill& fill, std::uint64_t bytes) {
  (fill.foreground() ? foreground_bytes_ : background_bytes_) += static_cast<double>(bytes);
}

}  // namespace warmserve
