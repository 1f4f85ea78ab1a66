#include "load/copy_engine.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "memory/arena.h"

namespace warmserve {
namespace {

// Pieces of a chunk that is not urgent. The limit of one chunk's bytes in flight then lets a loader
// send the next piece while the others move, which keeps the device busy.
constexpr std::uint64_t kPieces = 4;

// Wait per link if copies are in flight on several links: the links are waited for in turn.
constexpr std::chrono::microseconds kTurn{200};

}  // namespace

void CopyEngine::add_route(const RoutePtr& route) {
  const std::lock_guard lock(mutex_);
  links_.add(route);
}

void CopyEngine::drop_route(const std::string& name) {
  LinkPtr ended;  // destroyed without the lock
  const std::lock_guard lock(mutex_);
  ended = links_.drop(name);
}

std::vector<RouteState> CopyEngine::routes() {
  const std::lock_guard lock(mutex_);
  return links_.routes();
}

void CopyEngine::release() {
  std::vector<LinkPtr> routes;  // destroyed without the lock
  const std::lock_guard lock(mutex_);
  stream_.reset();
  spare_events_.clear();
  routes = links_.remove_routes();
}

// Acquires a staging chunk. While it waits it reaps completed copies, because these hold the
// chunks that it waits for.
StagingPool::Chunk CopyEngine::chunk() {
  const Deadline deadline = Clock::now() + staging_timeout_;
  for (;;) {
    if (auto chunk = staging_.try_acquire()) return std::move(*chunk);
    if (reap(true).completed) continue;
    try {
      return staging_.acquire(std::min(deadline, Clock::now() + kPollInterval), nullptr);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::staging_timeout || Clock::now() >= deadline) throw;
    }
  }
}

std::uint64_t CopyEngine::send(LayerLoad* load, const Model& model, const Layer& layer,
                               std::uint64_t begin, std::uint64_t end, const CopyOptions& options) {
  const std::uint64_t zeros = std::clamp(layer.bytes, begin, end);  // from here on
  HostBytes bytes_read;
  if (begin < zeros) bytes_read = bytes_of(model, layer, begin, zeros, options);
  const Deadline deadline = Clock::now() + staging_timeout_;
  const std::uint64_t piece = options.urgent ? zeros - begin : ceil_div(zeros - begin, kPieces);
  std::uint64_t at = begin;
  while (at < end) {
    const bool from_host = at < zeros;
    const std::uint64_t bytes = from_host ? std::min(piece, zeros - at) : end - at;
    const auto pending = std::make_shared<InFlightCopy>(InFlightCopy{
        load, options.generation, bytes, options.urgent, from_host ? bytes_read.owner : nullptr,
        copies_of(layer, at, bytes, from_host ? &bytes_read : nullptr)});
    try {
      if (!send_piece(pending, deadline, options)) break;
    } catch (...) {
      if (at == begin) throw;
      const std::lock_guard lock(mutex_);
      completions_.push_back({load, options.generation, 0, std::current_exception()});
      break;
    }
    at += bytes;
  }
  return at - begin;
}

// Returns memory that has layer bytes [begin, end): the image, or else a staging chunk. Reads the
// files, unless the image has the bytes already; then it checks that the files are unchanged.
CopyEngine::HostBytes CopyEngine::bytes_of(const Model& model, const Layer& layer,
                                           std::uint64_t begin, std::uint64_t end,
                                           const CopyOptions& options) {
  HostBytes made;
  if (const HostImagePtr& image = options.image) {
    made = {image, image->memory(begin, end), image->slabs(begin)};
  } else {
    const auto chunk = std::make_shared<StagingPool::Chunk>(this->chunk());
    made = {chunk, {begin, staging_.chunk_bytes(), {chunk->data()}}};
  }
  if (options.cached) {
    check_files_unchanged(model.files, layer.source, begin, end);
    return made;
  }
  read_layer(model.files, layer.source, begin, end, made.memory);
  arena_.device()->driver().host_read(end - begin);
  add_to_digests(layer.source.digests, {arena_.granule_bytes(), layer.bytes}, made.memory, begin,
                 end, options.sums);
  std::this_thread::sleep_until(options.not_before);
  return made;
}

// Returns the copies of layer bytes [begin, begin + bytes) from the memory to the layer's granules;
// null: zeros. One copy covers adjacent granules if their bytes are adjacent in one pinned region.
std::vector<Copy> CopyEngine::copies_of(const Layer& layer, std::uint64_t begin,
                                        std::uint64_t bytes, const HostBytes* from) const {
  const std::uint64_t granule_bytes = arena_.granule_bytes();
  std::vector<Copy> copies;
  const auto add = [&](const std::byte* memory, std::uint64_t at, std::uint64_t end) {
    bool joins = !copies.empty() && (!from || from->continues(at));
    while (at < end) {
      const std::uint64_t stop = std::min(end, (at / granule_bytes + 1) * granule_bytes);
      const Address to = arena_.window(layer.granules[at / granule_bytes]) + at % granule_bytes;
      if (joins && copies.back().ends_at(to, memory))
        copies.back().bytes += stop - at;
      else
        copies.push_back({to, memory, stop - at});
      joins = true;
      if (memory) memory += stop - at;
      at = stop;
    }
  };
  if (!from) {
    add(nullptr, begin, begin + bytes);
    return copies;
  }
  std::uint64_t at = begin;
  for_each_piece(from->memory, begin, begin + bytes,
                 [&](const std::byte* memory, std::uint64_t count) {
                   add(memory, at, at + count);
                   at += count;
                 });
  return copies;
}

// Starts the copies of a piece. Returns false if the load is not wanted any more.
bool CopyEngine::send_piece(const InFlightCopyPtr& pending, Deadline deadline,
                            const CopyOptions& options) {
  for (;;) {
    if (!options.wanted()) return false;
    {
      const std::lock_guard lock(mutex_);
      if (begin(pending)) return true;
    }
    if (Clock::now() >= deadline)
      throw Error(ErrorKind::staging_timeout,
                  "copies to the device made no progress within the staging timeout");
    const Reaped reaped = reap(true);
    if (!reaped.completed && !reaped.moving) std::this_thread::sleep_for(kPollInterval);
  }
}

// Starts the copies of a piece on the link that would finish them first; zeros, and copies that are
// not urgent, use the own link only. Returns false if the chosen route is full and the own link is
// busy, if a limit of the bytes in flight is reached, or if every link is still busy with its first
// piece, so that no speed is known.
bool CopyEngine::begin(const InFlightCopyPtr& pending) {
  if (pending->zeros()) {
    begin_on_own_link(pending);
    return true;
  }
  for (;;) {
    Link* const link = links_.choose(pending->bytes, pending->urgent, Clock::now());
    if (!link) return false;
    if (!link->route) {
      if (!pending->urgent && not_urgent_ && not_urgent_ + pending->bytes > staging_.chunk_bytes())
        return false;
      const LinkTraffic& own = links_.own().traffic;
      if (!own.idle() && own.in_flight() + pending->bytes > staging_.bytes()) return false;
      begin_on_own_link(pending);
      return true;
    }
    try {
      pending->route_copy = link->route->begin(pending->copies);
    } catch (const std::exception& error) {
      link->error = error.what();
      continue;
    }
    if (!pending->route_copy) {
      if (!links_.own().traffic.idle()) return false;
      begin_on_own_link(pending);
      return true;
    }
    link->in_flight.push_back(pending);
    link->traffic.sent(pending->bytes, Clock::now());
    return true;
  }
}

// Throws if it enqueued no copy.
void CopyEngine::begin_on_own_link(const InFlightCopyPtr& pending) {
  if (!stream_) stream_ = std::make_unique<Stream>(arena_.device(), StreamPriority::background);
  if (const auto error = enqueue(*pending))
    completions_.push_back({pending->load, pending->generation, 0, error});
  links_.own().in_flight.push_back(pending);
  if (pending->zeros()) return;
  links_.own().traffic.sent(pending->bytes, Clock::now());
  if (!pending->urgent) not_urgent_ += pending->bytes;
}

// Repeats on the own link the copies that a route failed to carry. The route's error is visible in
// RouteState only; an error of the own link is reported for the load.
void CopyEngine::begin_again(const InFlightCopyPtr& pending) {
  pending->route_copy.reset();
  try {
    begin_on_own_link(pending);
  } catch (...) {
    completions_.push_back({pending->load, pending->generation, 0, std::current_exception()});
    completions_.push_back({pending->load, pending->generation, pending->bytes, nullptr});
  }
}

// Enqueues the copies of a piece on the own link. Throws if it enqueued no copy. After the first
// copy it returns an error instead, because the piece must keep its chunk until the stream has
// passed it.
std::exception_ptr CopyEngine::enqueue(InFlightCopy& pending) {
  bool under_way = false;
  try {
    for (const Copy& copy : pending.copies) {
      if (copy.from)
        stream_->copy_to_device(copy.to, copy.from, copy.bytes);
      else
        stream_->fill_zero(copy.to, copy.bytes);
      under_way = true;
    }
    const std::shared_ptr<Event> event = spare_event();
    event->record(stream_->id());
    pending.event = event;
  } catch (...) {
    if (!under_way) throw;
    return std::current_exception();
  }
  return nullptr;
}

// Returns an event without waiters, because recording an event again would delay its waiters.
std::shared_ptr<Event> CopyEngine::spare_event() {
  const auto spare = std::find_if(spare_events_.begin(), spare_events_.end(),
                                  [](const auto& event) { return event.use_count() == 1; });
  if (spare == spare_events_.end()) return std::make_shared<Event>(arena_.device());
  std::shared_ptr<Event> event = std::move(*spare);
  spare_events_.erase(spare);
  return event;
}

bool CopyEngine::find_completions(bool wait) {
  reap(false);
  {
    const std::lock_guard lock(mutex_);
    if (!wait || !completions_.empty()) return false;
  }
  return reap(true).moving;
}

std::vector<CopyEngine::Completion> CopyEngine::take_completions() {
  const std::lock_guard lock(mutex_);
  return std::exchange(completions_, {});
}

bool CopyEngine::under_way() {
  const std::lock_guard lock(mutex_);
  return !completions_.empty() || links_.busy();
}

std::optional<CopyEngine::Events> CopyEngine::events(const LayerLoad* load) {
  Events events;
  const std::lock_guard lock(mutex_);
  for (const LinkPtr& link : links_.all())
    for (const InFlightCopyPtr& pending : link->in_flight) {
      if (pending->load != load) continue;
      if (!pending->event) return std::nullopt;
      events.push_back(pending->event);
    }
  return events;
}

CopyEngine::Reaped CopyEngine::reap(bool wait) {
  std::vector<LinkPtr> links;  // destroyed without the lock
  Reaped all;
  std::unique_lock lock(mutex_);
  links = links_.all();
  const auto busy = std::count_if(links.begin(), links.end(),
                                  [](const LinkPtr& link) { return !link->in_flight.empty(); });
  for (const LinkPtr& link : links) {
    const Wait link_wait = !wait || all.completed ? Wait{0}
                           : busy > 1             ? kTurn
                                                  : Wait{kPollInterval};
    const Reaped one = reap_link(lock, *link, link_wait);
    all.completed = all.completed || one.completed;
    all.moving = all.moving || one.moving;
  }
  links_.remove_ended();
  return all;
}

// Several threads may poll the same copies; the first one that sees it complete removes it.
CopyEngine::Reaped CopyEngine::reap_link(std::unique_lock<std::mutex>& lock, Link& link,
                                         Wait wait) {
  Reaped reaped;
  while (!link.in_flight.empty()) {
    InFlightCopyPtr pending = link.in_flight.front();
    std::shared_ptr<Event> event = pending->event;
    std::shared_ptr<RouteCopy> route_copy = pending->route_copy;
    lock.unlock();
    std::exception_ptr error;
    std::string why;
    const Copies copies =
        route_copy ? poll_route(*route_copy, wait, &why) : poll_event(event.get(), wait, error);
    lock.lock();
    if (error && std::exchange(pending->event, nullptr))
      completions_.push_back({pending->load, pending->generation, 0, error});
    reaped.moving = copies == Copies::moving;
    if (copies != Copies::over && copies != Copies::failed) break;
    reaped.completed = true;
    wait = Wait{0};
    if (link.in_flight.empty() || link.in_flight.front() != pending) continue;
    link.in_flight.pop_front();
    if (copies == Copies::failed) {
      link.traffic.lost(pending->bytes);
      if (link.error.empty()) link.error = why.empty() ? "the route gave no reason" : why;
      begin_again(pending);
      continue;
    }
    if (!pending->zeros()) {
      link.traffic.completed(pending->bytes, Clock::now());
      link.carried += pending->bytes;
      if (!pending->urgent) not_urgent_ -= pending->bytes;
    }
    event.reset();
    if (pending->event) spare_events_.push_back(std::move(pending->event));
    if (route_copy)
      for (const Copy& copy : pending->copies)
        arena_.device()->driver().peer_wrote(copy.to, copy.bytes);
    completions_.push_back({pending->load, pending->generation, pending->bytes, nullptr});
    lock.unlock();
    route_copy.reset();
    pending.reset();  // without the lock: returning its chunk takes the lock of the staging pool
    lock.lock();
  }
  return reaped;
}

CopyEngine::Copies CopyEngine::poll_route(RouteCopy& route_copy, Wait wait, std::string* why) {
  switch (route_copy.poll(Clock::now() + wait, why)) {
    case RouteCopy::State::arrived: return Copies::over;
    case RouteCopy::State::failed: return Copies::failed;
    case RouteCopy::State::moving: break;
  }
  return Copies::moving;
}

// Returns whether the copies have left the chunk. If the event fails, waits for the stream instead.
// A lost device no longer reads the chunk, so its copies count as over.
CopyEngine::Copies CopyEngine::poll_event(const Event* event, Wait wait,
                                          std::exception_ptr& error) {
  const Copies not_yet = arena_.device()->facts().threads ? Copies::moving : Copies::stuck;
  const auto lost = [](const Error& e) { return e.kind() == ErrorKind::device_lost; };
  if (event) {
    try {
      if (event->complete()) return Copies::over;
      if (!wait.count()) return not_yet;
      event->wait(Clock::now() + wait, nullptr);
      return Copies::over;
    } catch (const Error& caught) {
      if (caught.kind() == ErrorKind::timeout) return not_yet;
      error = std::current_exception();
      if (lost(caught)) return Copies::over;
    }
  }
  if (!wait.count()) return Copies::stuck;
  try {
    stream_->synchronize();
    return Copies::over;
  } catch (const Error& caught) {
    return lost(caught) ? Copies::over : Copies::stuck;
  }
}

}  // namespace warmserve
