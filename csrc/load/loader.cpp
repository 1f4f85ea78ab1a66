#include "load/loader.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "base/os_failure.h"

namespace warmserve {

using enum Residency;

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
    const unsigned threads = state.broker ? 0 : options.loaders;
    for (unsigned i = 0; i < threads; ++i) threads_.emplace_back(&Loader::run, this);
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
  if (state_.broker) return state_.broker->step();
  Lock lock = state_.lock();
  return step_once(lock);
}

void Loader::request(const Lock& lock, const TicketPtr& ticket) {
  queue_.add(lock, ticket);
  if (ticket->loads.empty()) finish_ticket(lock, ticket);
  if (state_.broker) {
    ask_for_lease(lock, *ticket);
    ask_broker(lock);
  }
  state_.wake();
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
    case LayerLoad::Next::copy:
      // Enqueuing these copies takes one thread. With several, chunks would overtake each other.
      if (load.cached && sending_image_[load.foreground()]) return cannot;
      copy_chunk(lock, load);
      return worked;
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
  if (std::vector<GranuleId> granules = state_.arena.remembered(layer.key); !granules.empty()) {
    start_remembered(lock, load, std::move(granules));
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
  if (cached) sending_image_[urgent] = true;
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
  if (cached) sending_image_[urgent] = false;
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
    Layer* const layer = load.layer;
    map_layers(state_.arena, std::span(&layer, 1));
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
