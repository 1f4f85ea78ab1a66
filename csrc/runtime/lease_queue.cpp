#include "runtime/lease_queue.h"

#include <pthread.h>

#include <algorithm>
#include <map>

namespace warmserve {

std::uint64_t this_thread() noexcept { return static_cast<std::uint64_t>(pthread_self()); }

std::string lease_on(const std::vector<Selection>& wants) {
  std::string names;
  for (const Selection& wanted : wants)
    names += (names.empty() ? "'" : ", '") + wanted.model->name + "'";
  return "lease on " + names;
}

std::string why_busy(const Model& model) {
  return model.leases ? "'" + model.name + "' is leased"
                      : "a pass still computes with '" + model.name + "'";
}

bool LeaseQueue::fits(const Lock& lock, const Lease& lease) const {
  std::uint64_t granules = state_.held_granules;
  for (const Selection& wanted : lease.wants) granules += state_.granules_to_hold(lock, wanted);
  return granules <= state_.arena.capacity();
}

// Returns whether the owner already holds all layers of the lease. Such a lease takes nothing new,
// and if it waited behind an owner that waits for its release, both would wait for ever.
bool LeaseQueue::nested(const Lease& lease) const {
  return std::all_of(lease.wants.begin(), lease.wants.end(), [&](const Selection& wanted) {
    LayerSet own;
    for (const Lease* other : admitted_)
      if (other->owner == lease.owner)
        for (const Selection& held : other->wants)
          if (held.model == wanted.model) own.insert(held.layers);
    return own.contains(wanted.layers);
  });
}

void LeaseQueue::admit(const Lock& lock, const LeasePtr& lease) {
  for (const Selection& wanted : lease->wants) state_.hold(lock, wanted, lease->pass);
  lease->admitted = true;
  lease->slot = admitted_.size();
  admitted_.push_back(lease.get());
}

bool LeaseQueue::try_admit(const Lock& lock, const LeasePtr& lease) {
  if (!(waiting_.empty() && fits(lock, *lease)) && !nested(*lease)) return false;
  admit(lock, lease);
  return true;
}

void LeaseQueue::add_waiter(const Lock& lock, const LeasePtr& lease) {
  std::uint64_t granules = 0;
  for (const Selection& wanted : lease->wants)
    wanted.for_each([&](const Layer& layer) { granules += layer.granules_needed; });
  const std::uint64_t bytes = granules * state_.arena.granule_bytes();
  if (granules > state_.arena.capacity())
    throw no_room(ErrorKind::out_of_device_memory, lease_on(lease->wants), bytes,
                  state_.arena.budget(), state_.holders(lock));
  waiting_.push_back(lease);
  if (would_deadlock()) {
    waiting_.pop_back();
    const Error room = no_room(ErrorKind::busy, lease_on(lease->wants), bytes,
                               state_.arena.budget(), state_.holders(lock));
    throw Error(ErrorKind::busy, std::string(room.what()) +
                                     "; the owners of the held layers would wait for this lease");
  }
}

LeasePtr LeaseQueue::begin_pass(const Lock& lock, const ModelPtr& model, std::uint64_t owner) {
  for (const LeasePtr& pass : passes_)
    if (pass->owner == owner && pass->wants.front().model == model) {
      ++pass->depth;
      return pass;
    }
  if (!model->leases) return nullptr;
  auto pass = std::make_shared<Lease>();
  if (model->whole_holds > model->whole_passes) {
    pass->wants.emplace_back(model);
  } else {
    LayerSet leased;
    for (const Layer& layer : model->layers)
      if (layer.leased()) leased.insert(layer.index);
    pass->wants.emplace_back(model, std::move(leased));
  }
  pass->owner = owner;
  pass->pass = true;
  pass->depth = 1;
  passes_.push_back(pass);
  admit(lock, pass);
  ++model->passes;
  return pass;
}

void LeaseQueue::extend(const Lock& lock, Lease& pass, const Layer& layer) {
  Selection& wanted = pass.wants.front();
  LayerSet added;
  added.insert(layer.index);
  Selection more(wanted.model, std::move(added));
  more.whole = false;  // counted per layer, like the selection that it is added to
  state_.hold(lock, more, true);
  wanted.layers.insert(layer.index);
}

bool LeaseQueue::in_pass(const Lock&, const Selection& selection, std::uint64_t owner) const {
  return std::any_of(passes_.begin(), passes_.end(), [&](const LeasePtr& pass) {
    const Selection& held = pass->wants.front();
    return pass->owner == owner && held.model == selection.model &&
           held.layers.intersects(selection.layers);
  });
}

LeasePtr LeaseQueue::admit_next(const Lock& lock) {
  if (waiting_.empty() || !fits(lock, *waiting_.front())) return nullptr;
  LeasePtr lease = std::move(waiting_.front());
  waiting_.pop_front();
  admit(lock, lease);
  return lease;
}

std::vector<LeasePtr> LeaseQueue::cancel_waiters(const Lock&, const ModelPtr& model) {
  std::vector<LeasePtr> out;
  for (const LeasePtr& lease : waiting_)
    for (const Selection& wanted : lease->wants)
      if (wanted.model == model) out.push_back(lease);
  for (const LeasePtr& lease : out) waiting_.remove(lease);
  return out;
}

std::size_t LeaseQueue::ahead_of(const Lock&, const LeasePtr& lease) const {
  return static_cast<std::size_t>(
      std::distance(waiting_.begin(), std::find(waiting_.begin(), waiting_.end(), lease)));
}

void LeaseQueue::remove(const Lock& lock, const LeasePtr& lease) {
  if (!lease->admitted) {
    waiting_.remove(lease);
    return;
  }
  lease->admitted = false;
  admitted_[lease->slot] = admitted_.back();
  admitted_[lease->slot]->slot = lease->slot;
  admitted_.pop_back();
  for (const Selection& wanted : lease->wants) state_.unhold(lock, wanted, lease->pass);
  if (!lease->pass) return;
  --lease->wants.front().model->passes;
  std::erase(passes_, lease);
}

void LeaseQueue::use_early(const Lock&, const Layer& layer) {
  for (Lease* lease : admitted_)
    if (lease->wants_layer(layer)) lease->used_early = true;
}

std::vector<TicketPtr> LeaseQueue::waiting_for(const Lock&, const Layer& layer) const {
  std::vector<TicketPtr> tickets;
  for (const Lease* lease : admitted_) {
    if (!lease->wants_layer(layer)) continue;
    if (lease->pass || lease->used_early || !lease->ticket || lease->ticket->done) return {};
    tickets.push_back(lease->ticket);
  }
  return tickets;
}

const Lease* LeaseQueue::failed(const Lock&, const Layer& layer) const {
  for (const Lease* lease : admitted_)
    if (lease->ticket && lease->ticket->error && lease->ticket->wants_layer(layer)) return lease;
  return nullptr;
}

// The safety check of Dijkstra's banker's algorithm, with the order of the queue. Assumes that
// owners which do not wait release everything. Then each waiting lease, from the first on, is
// admitted if it fits, and an owner releases everything once none of its leases waits. A first
// lease that does not fit even then can never be admitted.
bool LeaseQueue::would_deadlock() const {
  std::map<std::uint64_t, std::uint32_t> waits;  // owner: number of its leases that still wait
  for (const LeasePtr& lease : waiting_) ++waits[lease->owner];
  std::vector<const Lease*> held(admitted_.begin(), admitted_.end());
  for (const LeasePtr& head : waiting_) {
    std::erase_if(held, [&](const Lease* lease) { return !waits.contains(lease->owner); });
    std::map<const Model*, LayerSet> kept;
    const auto keep = [&](const Lease& lease) {
      for (const Selection& wanted : lease.wants) kept[wanted.model.get()].insert(wanted.layers);
    };
    for (const Lease* lease : held) keep(*lease);
    keep(*head);
    std::uint64_t granules = 0;
    for (const auto& [model, layers] : kept)
      layers.for_each(
          [&, &of = *model](std::uint32_t i) { granules += of.layers[i].granules_needed; });
    if (granules > state_.arena.capacity()) return true;
    if (--waits[head->owner] == 0) waits.erase(head->owner);
    held.push_back(head.get());
  }
  return false;
}

}  // namespace warmserve
