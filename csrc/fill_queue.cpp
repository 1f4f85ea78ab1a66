#include "fill_queue.h"

#include <algorithm>
#include <utility>

namespace warmserve {

void FillQueue::enlist(const Lock&, const TicketPtr& ticket) {
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

// A fill that has become more urgent goes behind those that are so already: the layers of one
// ticket keep their order.
void FillQueue::rerank(Fill& fill) {
  if (fill.tickets.empty()) return;
  const TicketPtr& ticket = fill.most_urgent();
  Rank rank{ticket->priority, ticket->deadline, fill.rank.sequence};
  if (!(rank < fill.rank) && !(fill.rank < rank)) return;
  if (rank < fill.rank) rank.sequence = sequence_++;
  auto node = order_.extract(fill.rank);
  node.key() = fill.rank = rank;
  order_.insert(std::move(node));
}

void FillQueue::drop(const Lock& lock, const TicketPtr& ticket, std::exception_ptr why) {
  for (Fill* fill : std::exchange(ticket->fills, {})) {
    std::erase(fill->tickets, ticket);
    if (fill->tickets.empty() && fill->phase == Fill::Phase::queued)
      forget(lock, *fill);
    else
      rerank(*fill);
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

std::vector<TicketPtr> FillQueue::release(const Lock&, Fill& fill) {
  std::vector<TicketPtr> tickets = std::exchange(fill.tickets, {});
  for (const TicketPtr& ticket : tickets) ticket->fills.erase(&fill);
  return tickets;
}

void FillQueue::forget(const Lock&, Fill& fill) {
  fill.layer->fill = nullptr;
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

void FillQueue::handed_out(const Lock&, const Fill& fill, std::uint64_t bytes) {
  (fill.foreground() ? foreground_bytes_ : background_bytes_) += static_cast<double>(bytes);
}

}  // namespace warmserve
