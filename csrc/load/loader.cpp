#include "load/loader.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "base/os_failure.h"

namespace warmserve {

using enum Residency;

namespace {

void give_up_if(bool unwanted) {
  if (unwanted) throw Error(ErrorKind::cancelled, "no ticket wants this work any more");
}

}  // namespace

Transfer::Transfer(Books& books, StagingPool& staging, const Options& options)
    : books_(books),
      chunk_bytes_(staging.chunk_bytes()),
      uploads_(books.arena, staging, options.staging_timeout),
      pump_(options.loaders == 0),
      queue_(books, options.background_share),
      pace_(options.read_bandwidth) {
  try {
    for (unsigned i = 0; i < options.loaders; ++i) loaders_.emplace_back(&Transfer::run, this);
  } catch (const std::system_error& error) {
    stop();
    throw Error(ErrorKind::general, os_failure("starting a thread for a loader",
                                               error.code().value(), OsLimit::threads));
  }
}

Transfer::~Transfer() { stop(); }

void Transfer::stop() {
  {
    const Lock lock(books_.mutex);
    stopping_ = pump_ = true;
    books_.wake();
  }
  for (std::thread& loader : loaders_) loader.join();
  loaders_.clear();
}

void Transfer::run() {
  Lock lock(books_.mutex);
  while (!stopping_) {
    const std::uint64_t seen = books_.version;
    if (advance(lock)) continue;  // advance() may release the lock, so a wake may have been missed
    const auto woken = [&] { return stopping_ || books_.version != seen; };
    Deadline until = queue_.next_deadline();
    if (uploads_.under_way()) until = std::min(until, Clock::now() + kPollInterval);
    if (until == kNever)
      books_.work.wait(lock, woken);
    else
      books_.work.wait_until(lock, until, woken);
  }
}

bool Transfer::step() {
  Lock lock(books_.mutex);
  return advance(lock);
}

void Transfer::request(const Lock& lock, const TicketPtr& ticket) {
  queue_.enlist(lock, ticket);
  if (ticket->fills.empty()) settle(lock, ticket);
  books_.wake();
}

void Transfer::drop_swaps(const Lock& lock, std::exception_ptr why) {
  for (const TicketPtr& ticket : std::exchange(swapping_, {})) drop(lock, ticket, why);
}

bool Transfer::advance(Lock& lock) {
  books_.room_wanted = false;
  queue_.expire(lock);
  if (!books_.arena.filled_by_host() && collect(lock, false)) return true;
  if (finish_swap(lock)) return true;
  bool no_room = false;
  const auto visit = [&](Fill& fill) {
    const FillQueue::Visited visited = advance(lock, fill);
    no_room |= visited == FillQueue::Visited::no_room;
    return visited;
  };
  if (queue_.serve(lock, chunk_bytes_, visit)) return true;
  books_.room_wanted = no_room;
  return !books_.arena.filled_by_host() && collect(lock, true);
}

// Does the next step of the fill. After `worked`, the order of the queue may have changed.
FillQueue::Visited Transfer::advance(Lock& lock, Fill& fill) {
  using enum FillQueue::Visited;
  switch (fill.next()) {
    case Fill::Next::none: return cannot;
    case Fill::Next::copy: copy_chunk(lock, fill); return worked;
    case Fill::Next::undo:
      if (!fill.idle()) return cannot;
      undo(lock, fill);
      return worked;
    case Fill::Next::start: break;
  }
  Layer& layer = *fill.layer;
  if (layer.owned) return cannot;
  if (layer.residency == resident) {  // it was draining; the drain failed, so it is still mapped
    complete(lock, fill);
    return worked;
  }
  if (layer.torn) {
    undo(lock, fill);
    return worked;
  }
  std::vector<Layer*> victims;
  switch (find_room(lock, fill, victims)) {
    case Room::enough: start(lock, fill, victims); return worked;
    case Room::later: return FillQueue::Visited::no_room;
    case Room::never: {
      const TicketPtr ticket = fill.most_urgent();
      const auto error = std::make_exception_ptr(warmserve::no_room(
          ErrorKind::busy, ticket->what, fill.span, books_.arena.budget(), books_.holders(lock)));
      drop(lock, ticket, error);  // other tickets of the fill may find room
      return worked;
    }
  }
  return cannot;
}

// Returns whether the fill can get granules now, later or never. Sets `victims` if layers have to
// be evicted for it. If it has to wait, fills of lower priority are asked to give way, unless their
// layers are held. Layers that the fill's most urgent ticket wants are neither evicted nor asked to
// give way.
Transfer::Room Transfer::find_room(const Lock& lock, Fill& fill, std::vector<Layer*>& victims) {
  const std::uint64_t need = fill.layer->granules_needed;
  const std::uint64_t have =
      std::uint64_t{books_.arena.free_count()} + books_.arena.uncreated_count();
  if (need <= have) return Room::enough;
  const Model* first = nullptr;
  for (const TicketPtr& ticket : fill.tickets)
    if (ticket->swapped_out) first = ticket->swapped_out.get();
  const Ticket& ticket = *fill.most_urgent();
  const EvictionOrder::Spared wanted_too{
      [&](const Model& model) { return ticket.wants_all_of(model); },
      [&](const Layer& layer) { return ticket.wants_layer(layer); }};
  victims = books_.choose_victims(lock, need - have, wanted_too, first);
  if (!victims.empty()) return Room::enough;
  bool coming = books_.granules_in_hand > 0 || books_.owned_layers > 0;
  for (Layer* layer : books_.filling) {
    ++books_.counters.layers_examined;
    if (layer->held() || ticket.wants_layer(*layer)) continue;
    coming = true;
    if (fill.rank.priority <= layer->fill->rank.priority) continue;
    layer->fill->give_way = true;
    queue_.relist(lock, *layer->fill);
  }
  return coming ? Room::later : Room::never;
}

// Evicts the victims and takes granules for the layer. Afterwards the layer is filling and has its
// granules; on an error the fill is undone.
void Transfer::start(Lock& lock, Fill& fill, const std::vector<Layer*>& victims) {
  Arena& arena = books_.arena;
  Layer& layer = *fill.layer;
  const std::uint64_t need = layer.granules_needed;
  const auto at_most = [](std::uint64_t count, std::uint32_t most) {
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(count, most));
  };
  std::vector<GranuleId> granules = arena.take(at_most(need, arena.free_count()));
  std::vector<GranuleId> fresh =
      arena.claim_uncreated(at_most(need - granules.size(), arena.uncreated_count()));
  books_.claim(lock, victims);
  books_.transition(lock, layer, filling);
  books_.own(lock, layer);
  fill.phase = Phase::starting;
  queue_.relist(lock, fill);
  std::exception_ptr error;
  bool gave_up = false;  // remembered: a ticket may join the fill before the lock is taken again
  try {
    const Poll poll = [&] {
      const Lock relock(books_.mutex);
      gave_up = stopping_ || fill.tickets.empty();
      give_up_if(gave_up);
    };
    if (!victims.empty()) drain(books_, lock, victims, kNever, poll, granules);
    lock.unlock();
    for (; !fresh.empty(); fresh.pop_back()) {
      arena.create(fresh.back());
      granules.push_back(fresh.back());
    }
    std::sort(granules.begin(), granules.end());  // on the host, neighbours share a kernel mapping
    const auto own = granules.begin() + static_cast<std::ptrdiff_t>(need);
    layer.granules.assign(granules.begin(), own);
    granules.erase(granules.begin(), own);
  } catch (...) {
    error = std::current_exception();
  }
  if (!lock.owns_lock()) lock.lock();
  books_.disown(lock, layer);
  fill.phase = Phase::copying;
  queue_.relist(lock, fill);
  arena.give(granules);
  arena.return_uncreated(fresh);
  if (error) {
    if (!gave_up) fail(lock, fill, error);
    undo(lock, fill);
  } else if (fill.span == 0) {
    complete(lock, fill);
  }
  books_.wake();
}

void Transfer::copy_chunk(Lock& lock, Fill& fill) {
  const std::uint64_t begin = fill.begin;
  const std::uint64_t end = begin + std::min(chunk_bytes_, fill.span - begin);
  fill.begin = end;
  queue_.relist(lock, fill);
  fill.in_flight += end - begin;
  ++fill.hands;
  ++books_.counters.chunks;
  queue_.handed_out(lock, fill, end - begin);
  const std::uint64_t bytes = fill.layer->bytes;
  const unsigned generation = fill.generation;
  const bool urgent = fill.foreground();
  const Deadline not_before = pace_.take(std::min(end, bytes) - std::min(begin, bytes));
  std::vector<std::uint64_t> sums(fill.layer->source.digests.size());
  lock.unlock();
  std::exception_ptr error;
  std::uint64_t sent = 0;
  const bool by_host = books_.arena.filled_by_host();
  const auto wanted = [&] {
    const Lock relock(books_.mutex);
    return !fill.unwanted();
  };
  try {
    if (by_host)
      sent = write_through_host_view(fill, begin, end, not_before, sums);
    else
      sent = uploads_.send(&fill, *fill.model, *fill.layer, begin, end,
                           {generation, urgent, not_before, wanted, sums});
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  if (error) meet(lock, fill, generation, error);
  fill.sent += sent;
  fill.sums.resize(sums.size());
  for (std::size_t i = 0; i < sums.size(); ++i) fill.sums[i] += sums[i];
  fill.in_flight -= end - begin - sent;
  if (by_host) arrived(lock, fill, sent);
  const bool last = fill.sent == fill.span;
  if (sent < end - begin || (last && fill.unwanted()))
    give_up(lock, fill);  // cancelled; must be undone even if a ticket joins it before that
  else if (const auto wrong = last ? wrong_content(fill) : nullptr)
    meet(lock, fill, generation, wrong);
  else if (last)
    map(lock, fill);
  --fill.hands;
  complete_if_all_is_there(lock, fill);
  books_.wake();
}

// Returns the error of a layer whose bytes were all read but do not match its digests; else null.
std::exception_ptr Transfer::wrong_content(const Fill& fill) const {
  const Layer& layer = *fill.layer;
  const GranuleCut cut{books_.arena.granule_bytes(), layer.bytes};
  const auto granule = wrong_granule(layer.source.digests, cut, fill.sums);
  if (!granule) return nullptr;
  std::string files;
  const File* last = nullptr;
  for (const Segment& segment : layer.source.segments) {
    const File* file = &fill.model->files[segment.file];
    if (segment.layer_offset >= cut.end(*granule) || file == last ||
        segment.layer_offset + segment.bytes <= cut.begin(*granule))
      continue;
    files += (last ? ", " : "") + file->path();
    last = file;
  }
  return std::make_exception_ptr(
      Error(ErrorKind::corrupt_checkpoint,
            files + ": granule " + std::to_string(*granule) + " of layer " +
                std::to_string(layer.index) + " of '" + fill.model->name +
                "' does not match its digest: the file was changed or is damaged; "
                "Runtime.reload() takes the model as its files are now"));
}

// Maps the fill's granules at the layer's addresses. Called by the loader that has sent the last
// chunk, without blocking the other loaders.
void Transfer::map(Lock& lock, Fill& fill) {
  const unsigned generation = fill.generation;
  books_.own(lock, *fill.layer);
  lock.unlock();
  std::exception_ptr error;
  try {
    back(books_.arena, *fill.layer);
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  books_.disown(lock, *fill.layer);
  fill.mapped = !error;
  if (error) meet(lock, fill, generation, error);
}

std::uint64_t Transfer::write_through_host_view(const Fill& fill, std::uint64_t begin,
                                                std::uint64_t end, Deadline not_before,
                                                std::span<std::uint64_t> sums) {
  const Arena& arena = books_.arena;
  const Layer& layer = *fill.layer;
  const std::uint64_t granule_bytes = arena.granule_bytes();
  const std::size_t first = begin / granule_bytes;
  Destination destination{first * granule_bytes, granule_bytes, {}};
  for (std::size_t i = first; i * granule_bytes < end; ++i)
    destination.blocks.push_back(arena.host_view(layer.granules[i]));
  read_layer(fill.model->files, layer.source, begin, end, destination);
  add_to_digests(layer.source.digests, {granule_bytes, layer.bytes}, destination, begin, end, sums);
  std::this_thread::sleep_until(not_before);
  for (std::size_t i = first; i * granule_bytes < end; ++i) {
    const std::uint64_t from = std::max(begin, i * granule_bytes);
    const std::uint64_t to = std::min(end, (i + 1) * granule_bytes);
    arena.device()->driver().host_wrote(arena.handle(layer.granules[i]), from % granule_bytes,
                                        to - from);
  }
  return end - begin;
}

// Accounts for the outcomes of copies. Returns whether there were outcomes or, with `wait`, copies
// that are still moving.
bool Transfer::collect(Lock& lock, bool wait) {
  bool moving = false;
  lock.unlock();
  const std::vector<Uploads::News> all = uploads_.collect(wait, &moving);
  lock.lock();
  for (const Uploads::News& news : all) {
    if (news.error)
      meet(lock, *news.fill, news.generation, news.error);
    else
      arrived(lock, *news.fill, news.bytes);
  }
  return moving || !all.empty();
}

// Finishes a ticket whose fills are all complete, or queues the eviction of the model that it swaps
// out.
void Transfer::settle(const Lock& lock, const TicketPtr& ticket) {
  if (ticket->swapped_out && !ticket->short_of)
    swapping_.push_back(ticket);
  else
    ticket->finish(books_, lock, ticket->short_of);
}

// Evicts the remaining layers of a model that a ticket swaps out, and finishes the ticket. Returns
// false if every such model has a layer that another thread owns or that is about to be undone.
bool Transfer::finish_swap(Lock& lock) {
  const auto next = std::find_if(swapping_.begin(), swapping_.end(), [](const TicketPtr& ticket) {
    const auto& layers = ticket->swapped_out->layers;
    return std::none_of(layers.begin(), layers.end(), [](const Layer& layer) {
      return layer.owned || (layer.residency == filling && layer.fill->tickets.empty());
    });
  });
  if (next == swapping_.end()) return false;
  const TicketPtr ticket = *next;
  swapping_.erase(next);
  const ModelPtr model = ticket->swapped_out;
  std::exception_ptr error;
  std::vector<Layer*> rest;
  for (Layer& layer : model->layers)
    if (!layer.owned && !layer.held() && (layer.residency == resident || layer.torn))
      rest.push_back(&layer);
  std::vector<GranuleId> freed;
  try {
    books_.claim(lock, rest);
    const Poll poll = [&] {
      const Lock relock(books_.mutex);
      give_up_if(stopping_ || ticket->done);
    };
    if (!rest.empty()) drain(books_, lock, rest, kNever, poll, freed);
  } catch (...) {
    error = std::current_exception();
  }
  books_.arena.give(freed);
  ticket->finish(books_, lock, error);
  return true;
}

}  // namespace warmserve
