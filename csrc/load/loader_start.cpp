// How a load starts: it finds room, evicts layers for it, and takes granules or an image.
#include <algorithm>
#include <utility>

#include "load/loader.h"

namespace warmserve {

using enum Residency;

namespace {

// Returns the layers that must not be evicted for the ticket, which must outlive the result.
EvictionOrder::Spared spared_by(const Ticket& ticket) {
  return {[&](const Model& model) { return ticket.wants_all_of(model); },
          [&](const Layer& layer) { return ticket.wants_layer(layer); }, ticket.evict_below};
}

}  // namespace

bool Loader::has_room(const Lock& lock, const Ticket& ticket) {
  std::uint64_t need = queue_.granules_queued(lock);
  for (const Selection& wanted : ticket.wants)
    wanted.for_each([&](const Layer& layer) {
      if (layer.residency != resident && !layer.load) need += layer.granules_needed;
    });
  const std::uint64_t have =
      std::uint64_t{state_.arena.free_count()} + state_.arena.trimmed_count();
  return need <= have ||
         !state_.choose_victims(lock, need - have, spared_by(ticket), nullptr).empty();
}
// Returns whether a load that is ahead of this one is evicting layers now. The driver unmaps
// granules one after the other, whichever thread asks, so a second eviction would only delay the
// first one.
bool Loader::evicts_behind_another(const LayerLoad& load) const {
  return std::any_of(evicting_.begin(), evicting_.end(),
                     [&](const LayerLoad* other) { return other->rank < load.rank; });
}

// Returns whether the load can get granules now, later or never. Sets `victims` if layers have to
// be evicted for it. If it has to wait, loads of lower priority are preempted, unless their layers
// are held. Layers that the load's most urgent ticket wants are neither evicted nor preempted.
Loader::Room Loader::find_room(const Lock& lock, LayerLoad& load, std::vector<Layer*>& victims) {
  const std::uint64_t need = load.layer->granules_needed;
  const std::uint64_t have =
      std::uint64_t{state_.arena.free_count()} + state_.arena.trimmed_count();
  if (need <= have) return Room::enough;
  const Ticket& ticket = *load.most_urgent();
  EvictionOrder::Spared spared = spared_by(ticket);
  const Model* first = nullptr;
  for (const TicketPtr& each : load.tickets) {
    if (each->swapped_out) first = each->swapped_out.get();
    spared.keep_value = std::max(spared.keep_value, each->evict_below);
  }
  victims = state_.choose_victims(lock, need - have, spared, first);
  if (!victims.empty()) return Room::enough;
  bool coming = state_.granules_in_hand > 0 || state_.busy_layers > 0 ||
                state_.held_by_clients > 0 || state_.arena.aside_count() > 0;
  for (Layer* layer : state_.filling) {
    ++state_.counters.layers_examined;
    if (layer->held() || ticket.wants_layer(*layer)) continue;
    coming = true;
    if (load.rank.priority <= layer->load->rank.priority) continue;
    abandon(lock, *layer->load, Verdict::preempted);
  }
  return coming ? Room::later : Room::never;
}

// Evicts the victims and takes granules for the layer. Afterwards the layer is filling and has its
// granules; on an error the load is undone.
void Loader::start(Lock& lock, LayerLoad& load, const std::vector<Layer*>& victims) {
  Arena& arena = state_.arena;
  Layer& layer = *load.layer;
  const std::uint64_t need = layer.granules_needed;
  const auto at_most = [](std::uint64_t count, std::uint32_t most) {
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(count, most));
  };
  std::vector<GranuleId> granules = arena.take(at_most(need, arena.free_count()));
  std::vector<GranuleId> fresh =
      arena.claim_trimmed(at_most(need - granules.size(), arena.trimmed_count()));
  state_.claim(lock, victims);
  state_.transition(lock, layer, filling);
  state_.mark_busy(lock, layer);
  load.phase = Phase::starting;
  if (!victims.empty()) evicting_.push_back(&load);
  queue_.relist(lock, load);
  std::exception_ptr error;
  bool gave_up = false;  // remembered: a ticket may join the load before the lock is taken again
  bool held_by_client = false;
  try {
    const Poll poll = [&] {
      const Lock relock = state_.lock();
      gave_up = stopping_ || load.tickets.empty();
      give_up_if(gave_up);
      // It waits for work on the device, so it unmaps nothing: the loads behind it may evict.
      if (std::erase(evicting_, &load)) state_.wake();
    };
    if (!victims.empty()) drain_and_unmap(state_, lock, victims, kNever, poll, granules);
    lock.unlock();
    for (; !fresh.empty(); fresh.pop_back()) {
      arena.create(fresh.back());
      granules.push_back(fresh.back());
    }
    std::sort(granules.begin(),
              granules.end());  // on the host, adjacent ones share a kernel mapping
    const auto own = granules.begin() + static_cast<std::ptrdiff_t>(need);
    layer.granules.assign(granules.begin(), own);
    granules.erase(granules.begin(), own);
  } catch (const HeldByClient&) {  // the load starts again, and evicts other layers
    held_by_client = true;
    error = std::current_exception();
  } catch (...) {
    error = std::current_exception();
  }
  if (!lock.owns_lock()) lock.lock();
  std::erase(evicting_, &load);
  state_.mark_idle(lock, layer);
  load.phase = Phase::copying;
  queue_.relist(lock, load);
  arena.give(granules);
  arena.return_trimmed(fresh);
  if (error) {
    if (!gave_up && !held_by_client) fail(lock, load, error);
    undo(lock, load);
  } else if (load.span == 0) {
    complete(lock, load);
  } else {
    arena.forget(layer.granules);
    choose_source(lock, load);
  }
  state_.wake();
}

// Takes granules that contain the layer already, and maps them. No byte is copied. The files are
// not looked at if the granules are set aside: a client still uses the layer.
void Loader::start_remembered(Lock& lock, LayerLoad& load, std::vector<GranuleId> granules) {
  Layer& layer = *load.layer;
  const unsigned generation = load.generation;
  const bool in_use = state_.arena.is_aside(granules.front());
  state_.arena.take_remembered(granules);
  layer.granules = std::move(granules);
  state_.transition(lock, layer, filling);
  load.phase = Phase::copying;
  load.remembered = true;
  load.begin = load.sent = load.in_flight = load.span;
  ++load.workers;  // nothing undoes the load meanwhile
  queue_.relist(lock, load);
  lock.unlock();
  std::exception_ptr error;
  try {
    if (!in_use) check_files_unchanged(load.model->files, layer.source, 0, layer.bytes);
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  if (error)
    on_error(lock, load, generation, error);
  else
    map(lock, load);
  --load.workers;
  arrived(lock, load, load.span);
}

// Chooses the memory that the load's copies read: an image in the host cache, a new image that the
// load fills from the files, or staging chunks.
void Loader::choose_source(const Lock& lock, LayerLoad& load) {
  load.image = host_cache_.find(lock, *load.layer);
  load.cached = load.image != nullptr;
  if (!load.cached) load.image = host_cache_.make(lock, *load.layer);
}

// Takes an image for a load to the host cache. Waits while images are in use or memory is being
// pinned; otherwise the load's tickets end with busy.
LoadQueue::Visited Loader::start_to_host(Lock& lock, LayerLoad& load) {
  if (load.layer->image) {  // a load to the device has made it meanwhile
    complete(lock, load);
    return LoadQueue::Visited::worked;
  }
  load.image = host_cache_.make(lock, *load.layer);
  if (load.image) {
    load.phase = Phase::copying;
    queue_.relist(lock, load);
    return LoadQueue::Visited::worked;
  }
  if (host_cache_.room_is_coming(lock)) {
    host_room_wanted_ = true;
    return LoadQueue::Visited::cannot;
  }
  fail(lock, load,
       std::make_exception_ptr(Error(
           ErrorKind::busy, load.most_urgent()->what +
                                " to the host cache does not fit beside layers of a higher keep "
                                "value")));
  undo(lock, load);
  return LoadQueue::Visited::worked;
}

}  // namespace warmserve
