#include "uploads.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "arena.h"

namespace warmserve {
namespace {

// Of a chunk that is not urgent: the device is idle only if nobody sends the next piece while the
// others move.
constexpr std::uint64_t kPieces = 4;

}  // namespace

// Waiting for a chunk, a loader collects: the chunks it waits for are those under way.
StagingPool::Chunk Uploads::chunk() {
  const Deadline deadline = Clock::now() + staging_timeout_;
  for (;;) {
    if (auto chunk = staging_.try_acquire()) return std::move(*chunk);
    if (gather(true).landed) continue;
    try {
      return staging_.acquire(std::min(deadline, Clock::now() + kPollInterval), nullptr);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::staging_timeout || Clock::now() >= deadline) throw;
    }
  }
}

std::uint64_t Uploads::send(Fill* fill, const Model& model, const Layer& layer, std::uint64_t begin,
                            std::uint64_t end, const Terms& terms) {
  const auto chunk = std::make_shared<StagingPool::Chunk>(this->chunk());
  read_layer(model.files, layer.source, begin, end,
             {begin, staging_.chunk_bytes(), {chunk->data()}});
  std::this_thread::sleep_until(terms.not_before);
  const Deadline deadline = Clock::now() + staging_timeout_;
  const std::uint64_t piece = terms.urgent ? end - begin : ceil_div(end - begin, kPieces);
  std::uint64_t at = begin;
  while (at < end) {
    const std::uint64_t bytes = std::min(piece, end - at);
    const auto flight = std::make_shared<Flight>(
        Flight{fill, terms.generation, bytes, terms.urgent, chunk, nullptr});
    try {
      if (!send_piece(flight, layer, at, chunk->data() + (at - begin), deadline, terms)) break;
    } catch (...) {
      if (at == begin) throw;
      const std::lock_guard lock(mutex_);
      news_.push_back({fill, terms.generation, 0, std::current_exception()});
      break;
    }
    at += bytes;
  }
  return at - begin;
}

// False: it is not wanted any more.
bool Uploads::send_piece(const FlightPtr& flight, const Layer& layer, std::uint64_t begin,
                         const std::byte* bytes, Deadline deadline, const Terms& terms) {
  for (;;) {
    if (!terms.wanted()) return false;
    {
      const std::lock_guard lock(mutex_);
      if (terms.urgent || !not_urgent_ || not_urgent_ + flight->bytes <= staging_.chunk_bytes()) {
        if (!stream_)
          stream_ = std::make_unique<Stream>(arena_.device(), StreamPriority::background);
        if (const auto error = enqueue(*flight, layer, begin, bytes))
          news_.push_back({flight->fill, flight->generation, 0, error});
        flights_.push_back(flight);
        if (!terms.urgent) not_urgent_ += flight->bytes;
        return true;
      }
    }
    if (Clock::now() >= deadline)
      throw Error(ErrorKind::staging_timeout, "copies to the device do not move");
    const Gathered gathered = gather(true);
    if (!gathered.landed && !gathered.moving) std::this_thread::sleep_for(kPollInterval);
  }
}

// Neighbouring granules take one copy. Once a copy is under way an error is returned, not thrown:
// the flight goes on, for its chunk must stay until the stream has passed it.
std::exception_ptr Uploads::enqueue(Flight& flight, const Layer& layer, std::uint64_t begin,
                                    const std::byte* bytes) {
  const std::uint64_t granule_bytes = arena_.granule_bytes(), end = begin + flight.bytes;
  bool under_way = false;
  try {
    for (std::uint64_t at = begin; at < end;) {
      const std::size_t first = at / granule_bytes;
      std::size_t last = first;
      while ((last + 1) * granule_bytes < end &&
             layer.granules[last + 1] == layer.granules[last] + 1)
        ++last;
      const std::uint64_t stop = std::min(end, (last + 1) * granule_bytes);
      stream_->copy_to_device(arena_.window(layer.granules[first]) + at % granule_bytes,
                              bytes + (at - begin), stop - at);
      under_way = true;
      at = stop;
    }
    const std::shared_ptr<Event> event = spare_event();
    event->record(stream_->id());
    flight.event = event;
  } catch (...) {
    if (!under_way) throw;
    return std::current_exception();
  }
  return nullptr;
}

// One that nobody waits for any more: recorded anew it would keep them.
std::shared_ptr<Event> Uploads::spare_event() {
  const auto spare = std::find_if(spare_events_.begin(), spare_events_.end(),
                                  [](const auto& event) { return event.use_count() == 1; });
  if (spare == spare_events_.end()) return std::make_shared<Event>(arena_.device());
  std::shared_ptr<Event> event = std::move(*spare);
  spare_events_.erase(spare);
  return event;
}

std::vector<Uploads::News> Uploads::collect(bool wait, bool* moving) {
  gather(false);
  std::unique_lock lock(mutex_);
  if (wait && news_.empty()) {
    lock.unlock();
    const bool more = gather(true).moving;
    if (moving) *moving = more;
    lock.lock();
  }
  return std::exchange(news_, {});
}

bool Uploads::under_way() {
  const std::lock_guard lock(mutex_);
  return !flights_.empty() || !news_.empty();
}

std::optional<Uploads::Events> Uploads::events(const Fill* fill) {
  Events events;
  const std::lock_guard lock(mutex_);
  for (const FlightPtr& flight : flights_) {
    if (flight->fill != fill) continue;
    if (!flight->event) return std::nullopt;
    events.push_back(flight->event);
  }
  return events;
}

void Uploads::release() {
  const std::lock_guard lock(mutex_);
  stream_.reset();
  spare_events_.clear();
}

// Several threads may look at the same copy; the first to see it over takes it.
Uploads::Gathered Uploads::gather(bool wait) {
  Gathered gathered;
  std::unique_lock lock(mutex_);
  while (!flights_.empty()) {
    FlightPtr flight = flights_.front();
    std::shared_ptr<Event> event = flight->event;
    lock.unlock();
    std::exception_ptr error;
    const Copies copies = look(event.get(), wait, error);
    lock.lock();
    if (error && std::exchange(flight->event, nullptr))
      news_.push_back({flight->fill, flight->generation, 0, error});
    gathered.moving = copies == Copies::moving;
    if (copies != Copies::over) break;
    gathered.landed = true;
    wait = false;
    if (flights_.empty() || flights_.front() != flight) continue;
    flights_.pop_front();
    if (!flight->urgent) not_urgent_ -= flight->bytes;
    event.reset();
    if (flight->event) spare_events_.push_back(std::move(flight->event));
    news_.push_back({flight->fill, flight->generation, flight->bytes, nullptr});
    lock.unlock();
    flight.reset();  // its chunk has a lock of its own
    lock.lock();
  }
  return gathered;
}

// Whether the copies have left the chunk. Where the event fails, the stream is waited for; a device
// that is lost will not read the chunk any more.
Uploads::Copies Uploads::look(const Event* event, bool wait, std::exception_ptr& error) {
  const Copies not_yet = arena_.device()->facts().threads ? Copies::moving : Copies::stuck;
  const auto lost = [](const Error& e) { return e.kind() == ErrorKind::device_lost; };
  if (event) {
    try {
      if (event->complete()) return Copies::over;
      if (!wait) return not_yet;
      event->wait(Clock::now() + kPollInterval, nullptr);
      return Copies::over;
    } catch (const Error& caught) {
      if (caught.kind() == ErrorKind::timeout) return not_yet;
      error = std::current_exception();
      if (lost(caught)) return Copies::over;
    }
  }
  if (!wait) return Copies::stuck;
  try {
    stream_->synchronize();
    return Copies::over;
  } catch (const Error& caught) {
    return lost(caught) ? Copies::over : Copies::stuck;
  }
}

}  // namespace warmserve
