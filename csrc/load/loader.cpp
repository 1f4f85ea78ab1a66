#include "load/loader.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "base/os_failure.h"

namespace warmserve {

using enum Residency;

namespace {

// Returns the layers that must not be evicted for the ticket, which must outlive the result.
EvictionOrder::Spared spared_by(const Ticket& ticket) {
  return {[&](const Model& model) { return ticket.wants_all_of(model); },
          [&](const Layer& layer) { return ticket.wants_layer(layer); }, ticket.evict_below};
}

void give_up_if(bool unwanted) {
  if (unwanted) throw Error(ErrorKind::cancelled, "no ticket wants this work any more");
}

}  // namespace

Loader::Loader(SharedState& state, StagingPool& staging, HostCache& host_cache,
               const Options& options)
    : state_(state),
      host_cache_(host_cache),
      chunk_bytes_(staging.chunk_bytes()),
      copy_engine_(state.arena, staging, options.staging_timeout),
      pump_(options.loaders == 0),
      queue_(state, options.background_share),
      pace_(options.read_bandwidth) {
  try {
    for (unsigned i = 0; i < options.loaders; ++i) threads_.emplace_back(&Loader::run, this);
  } catch (const std::system_error& error) {
    stop();
    throw Error(ErrorKind::general, os_failure("starting a thread for a loader",
                                               error.code().value(), OsLimit::threads));
  }
}

Loader::~Loader() { stop(); }

void Loader::stop() {
  {
    const Lock lock = state_.lock();
    stopping_ = pump_ = true;
    state_.wake();
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void Loader::run() {
  Lock lock = state_.lock();
  while (!stopping_) {
    const std::uint64_t seen = state_.version;
    if (step_once(lock))
      continue;  // step_once() may release the lock, so a wake may have been missed
    const auto woken = [&] { return stopping_ || state_.version != seen; };
    Deadline until = queue_.next_deadline();
    if (copy_engine_.under_way() || host_room_wanted_)
      until = std::min(until, Clock::now() + kPollInterval);
    if (until == kNever)
      state_.work.wait(lock, woken);
    else
      state_.work.wait_until(lock, until, woken);
  }
}

bool Loader::step() {
  Lock lock = state_.lock();
  return step_once(lock);
}

void Loader::request(const Lock& lock, const TicketPtr& ticket) {
  queue_.add(lock, ticket);
  if (ticket->loads.empty()) finish_ticket(lock, ticket);
  state_.wake();
}

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

void Loader::drop_swaps(const Lock& lock, std::exception_ptr why) {
  for (const TicketPtr& ticket : std::exchange(swapping_, {})) drop(lock, ticket, why);
}

bool Loader::step_once(Lock& lock) {
  state_.room_wanted = host_room_wanted_ = false;
  queue_.expire(lock);
  if (!state_.arena.filled_by_host() && account_completions(lock, false)) return true;
  if (finish_swap(lock)) return true;
  bool no_room = false;
  const auto visit = [&](LayerLoad& load) {
    const LoadQueue::Visited visited = step_load(lock, load);
    no_room |= visited == LoadQueue::Visited::no_room;
    return visited;
  };
  if (queue_.serve(lock, chunk_bytes_, visit)) return true;
  state_.room_wanted = no_room;
  return !state_.arena.filled_by_host() && account_completions(lock, true);
}

// Does the next step of the load. After `worked`, the order of the queue may have changed.
LoadQueue::Visited Loader::step_load(Lock& lock, LayerLoad& load) {
  using enum LoadQueue::Visited;
  switch (load.next()) {
    case LayerLoad::Next::none: return cannot;
    case LayerLoad::Next::copy: copy_chunk(lock, load); return worked;
    case LayerLoad::Next::undo:
      if (!load.idle()) return cannot;
      undo(lock, load);
      return worked;
    case LayerLoad::Next::start: break;
  }
  if (load.to_host) return start_to_host(lock, load);
  Layer& layer = *load.layer;
  if (layer.busy) return cannot;
  if (layer.residency == resident) {  // it was draining; the drain failed, so it is still mapped
    complete(lock, load);
    return worked;
  }
  if (layer.unmap_failed) {
    undo(lock, load);
    return worked;
  }
  std::vector<Layer*> victims;
  switch (find_room(lock, load, victims)) {
    case Room::enough:
      if (!victims.empty() && evicts_behind_another(load)) return LoadQueue::Visited::no_room;
      start(lock, load, victims);
      return worked;
    case Room::later: return LoadQueue::Visited::no_room;
    case Room::never: {
      const TicketPtr ticket = load.most_urgent();
      const auto error = std::make_exception_ptr(warmserve::no_room(
          ErrorKind::busy, ticket->what, load.span, state_.arena.budget(), state_.holders(lock)));
      drop(lock, ticket, error);  // other tickets of the load may find room
      return worked;
    }
  }
  return cannot;
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
  bool coming = state_.granules_in_hand > 0 || state_.busy_layers > 0;
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
    if (!gave_up) fail(lock, load, error);
    undo(lock, load);
  } else if (load.span == 0) {
    complete(lock, load);
  } else {
    choose_source(lock, load);
  }
  state_.wake();
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

void Loader::copy_chunk(Lock& lock, LayerLoad& load) {
  const std::uint64_t begin = load.begin;
  const std::uint64_t end = begin + std::min(chunk_bytes_, load.span - begin);
  load.begin = end;
  load.in_flight += end - begin;
  queue_.relist(lock, load);
  ++load.workers;
  ++state_.counters.chunks;
  queue_.handed_out(lock, load, end - begin);
  const std::uint64_t bytes = load.layer->bytes;
  const unsigned generation = load.generation;
  const bool urgent = load.foreground();
  const std::uint64_t read = load.cached ? 0 : std::min(end, bytes) - std::min(begin, bytes);
  const Deadline not_before = pace_.take(read);
  const bool cached = load.cached;
  const HostImagePtr image = load.image;
  std::vector<std::uint64_t> sums(load.layer->source.digests.size());
  lock.unlock();
  std::exception_ptr error;
  std::uint64_t sent = 0;
  const bool by_host = load.to_host || state_.arena.filled_by_host();
  const auto wanted = [&] {
    const Lock relock = state_.lock();
    return !load.unwanted();
  };
  try {
    if (load.to_host)
      sent = read_into_image(load, begin, end, not_before, sums);
    else if (by_host)
      sent = write_through_host_view(load, begin, end, not_before, sums);
    else
      sent = copy_engine_.send(&load, *load.model, *load.layer, begin, end,
                               {generation, urgent, not_before, wanted, sums, image, cached});
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  if (error) on_error(lock, load, generation, error);
  load.sent += sent;
  load.sums.resize(sums.size());
  for (std::size_t i = 0; i < sums.size(); ++i) load.sums[i] += sums[i];
  load.in_flight -= end - begin - sent;
  if (by_host) arrived(lock, load, sent);
  const bool last = load.sent == load.span;
  // A cancelled load must be undone even if a ticket joins it before that.
  if (sent < end - begin || (last && load.unwanted())) {
    abandon(lock, load, Verdict::failed);
  } else if (const auto wrong = last && !cached ? wrong_content(load) : nullptr) {
    on_error(lock, load, generation, wrong);
  } else if (last) {
    if (image && !cached) host_cache_.keep(lock, *load.layer, image);
    if (load.to_host)
      load.phase = Phase::arriving;
    else
      map(lock, load);
    queue_.relist(lock, load);
  }
  --load.workers;
  complete_if_all_arrived(lock, load);
  state_.wake();
}

// Maps the load's granules at the layer's addresses. Called by the loader thread that has sent the
// last chunk, without blocking the other threads.
void Loader::map(Lock& lock, LayerLoad& load) {
  const unsigned generation = load.generation;
  state_.mark_busy(lock, *load.layer);
  lock.unlock();
  std::exception_ptr error;
  try {
    map_layer(state_.arena, *load.layer);
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  state_.mark_idle(lock, *load.layer);
  if (error) return on_error(lock, load, generation, error);
  load.phase = Phase::arriving;
  queue_.relist(lock, load);
}

// Accounts for the outcomes of copies. Returns whether there were outcomes or, with `wait`, copies
// that are still moving.
bool Loader::account_completions(Lock& lock, bool wait) {
  lock.unlock();
  const bool moving = copy_engine_.find_completions(wait);
  lock.lock();
  const std::vector<CopyEngine::Completion> all = copy_engine_.take_completions();
  for (const CopyEngine::Completion& completion : all) {
    if (completion.error)
      on_error(lock, *completion.load, completion.generation, completion.error);
    else
      arrived(lock, *completion.load, completion.bytes);
  }
  return moving || !all.empty();
}

// Finishes a ticket whose loads are all complete, or queues the eviction of the model that it swaps
// out.
void Loader::finish_ticket(const Lock& lock, const TicketPtr& ticket) {
  if (ticket->swapped_out && !ticket->partial_error)
    swapping_.push_back(ticket);
  else
    ticket->finish(state_, lock, ticket->partial_error);
}

// Evicts the remaining layers of a model that a ticket swaps out, and finishes the ticket. Returns
// false if every such model has a layer that is busy or about to be undone.
bool Loader::finish_swap(Lock& lock) {
  const auto next = std::find_if(swapping_.begin(), swapping_.end(), [](const TicketPtr& ticket) {
    const auto& layers = ticket->swapped_out->layers;
    return std::none_of(layers.begin(), layers.end(), [](const Layer& layer) {
      return layer.busy || (layer.residency == filling && layer.load->tickets.empty());
    });
  });
  if (next == swapping_.end()) return false;
  const TicketPtr ticket = *next;
  swapping_.erase(next);
  const ModelPtr model = ticket->swapped_out;
  std::exception_ptr error;
  std::vector<Layer*> rest;
  for (Layer& layer : model->layers)
    if (!layer.busy && !layer.held() && (layer.residency == resident || layer.unmap_failed))
      rest.push_back(&layer);
  std::vector<GranuleId> freed;
  try {
    state_.claim(lock, rest);
    const Poll poll = [&] {
      const Lock relock = state_.lock();
      give_up_if(stopping_ || ticket->done);
    };
    if (!rest.empty()) drain_and_unmap(state_, lock, rest, kNever, poll, freed);
  } catch (...) {
    error = std::current_exception();
  }
  state_.arena.give(freed);
  ticket->finish(state_, lock, error);
  return true;
}

}  // namespace warmserve
