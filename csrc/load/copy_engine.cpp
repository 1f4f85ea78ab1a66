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

// Acquires a staging chunk. While it waits it gathers finished copies, because these hold the
// chunks that it waits for.
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
  const Destination destination{begin, staging_.chunk_bytes(), {chunk->data()}};
  read_layer(model.files, layer.source, begin, end, destination);
  add_to_digests(layer.source.digests, {arena_.granule_bytes(), layer.bytes}, destination, begin,
                 end, terms.sums);
  std::this_thread::sleep_until(terms.not_before);
  const Deadline deadline = Clock::now() + staging_timeout_;
  const std::uint64_t piece = terms.urgent ? end - begin : ceil_div(end - begin, kPieces);
  std::uint64_t at = begin;
  while (at < end) {
    const std::uint64_t bytes = std::min(piece, end - at);
    const auto flight =
        std::make_shared<Flight>(Flight{fill, terms.generation, bytes, terms.urgent, chunk,
                                        copies_of(layer, at, bytes, chunk->data() + (at - begin))});
    try {
      if (!send_piece(flight, deadline, terms)) break;
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

// Returns the copies to the granules of layer bytes [begin, begin + bytes). Neighbouring granules
// take one copy.
std::vector<Copy> Uploads::copies_of(const Layer& layer, std::uint64_t begin, std::uint64_t bytes,
                                     const std::byte* from) const {
  const std::uint64_t granule_bytes = arena_.granule_bytes(), end = begin + bytes;
  std::vector<Copy> copies;
  for (std::uint64_t at = begin; at < end;) {
    const std::size_t first = at / granule_bytes;
    std::size_t last = first;
    while ((last + 1) * granule_bytes < end && layer.granules[last + 1] == layer.granules[last] + 1)
      ++last;
    const std::uint64_t stop = std::min(end, (last + 1) * granule_bytes);
    copies.push_back({arena_.window(layer.granules[first]) + at % granule_bytes,
                      from + (at - begin), stop - at});
    at = stop;
  }
  return copies;
}

// Starts the copies of a piece. Returns false if the fill is not wanted any more.
bool Uploads::send_piece(const FlightPtr& flight, Deadline deadline, const Terms& terms) {
  for (;;) {
    if (!terms.wanted()) return false;
    {
      const std::lock_guard lock(mutex_);
      if (begin(flight)) return true;
    }
    if (Clock::now() >= deadline)
      throw Error(ErrorKind::staging_timeout,
                  "copies to the device made no progress within the staging timeout");
    const Gathered gathered = gather(true);
    if (!gathered.landed && !gathered.moving) std::this_thread::sleep_for(kPollInterval);
  }
}

// Enqueues the copies of a flight on the own link. Throws if it enqueued no copy. After the first
// copy it returns an error instead, because the flight must keep its chunk until the stream has
// passed it.
std::exception_ptr Uploads::enqueue(Flight& flight) {
  bool under_way = false;
  try {
    for (const Copy& copy : flight.copies) {
      stream_->copy_to_device(copy.to, copy.from, copy.bytes);
      under_way = true;
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

// Returns an event that is not waited for: re-recording one that is waited for would delay the
// waiter.
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
  return !news_.empty() || std::any_of(lanes_.begin(), lanes_.end(),
                                       [](const LanePtr& lane) { return !lane->flights.empty(); });
}

std::optional<Uploads::Events> Uploads::events(const Fill* fill) {
  Events events;
  const std::lock_guard lock(mutex_);
  for (const LanePtr& lane : lanes_)
    for (const FlightPtr& flight : lane->flights) {
      if (flight->fill != fill) continue;
      if (!flight->event) return std::nullopt;
      events.push_back(flight->event);
    }
  return events;
}

Uploads::Gathered Uploads::gather(bool wait) {
  std::vector<LanePtr> lanes;  // destroyed without the lock
  Gathered all;
  std::unique_lock lock(mutex_);
  lanes = lanes_;
  const auto busy = std::count_if(lanes.begin(), lanes.end(),
                                  [](const LanePtr& lane) { return !lane->flights.empty(); });
  for (const LanePtr& lane : lanes) {
    const Wait patience = !wait || all.landed ? Wait{0} : busy > 1 ? kTurn : Wait{kPollInterval};
    const Gathered one = gather(lock, *lane, patience);
    all.landed = all.landed || one.landed;
    all.moving = all.moving || one.moving;
  }
  std::erase_if(lanes_, [](const LanePtr& lane) { return lane->dropped && lane->flights.empty(); });
  return all;
}

// Several threads may look at the same copy; the first one that sees it complete removes it.
Uploads::Gathered Uploads::gather(std::unique_lock<std::mutex>& lock, Lane& lane, Wait wait) {
  Gathered gathered;
  while (!lane.flights.empty()) {
    FlightPtr flight = lane.flights.front();
    std::shared_ptr<Event> event = flight->event;
    std::shared_ptr<Crossing> crossing = flight->crossing;
    lock.unlock();
    std::exception_ptr error;
    std::string why;
    const Copies copies = crossing ? look(*crossing, wait, &why) : look(event.get(), wait, error);
    lock.lock();
    if (error && std::exchange(flight->event, nullptr))
      news_.push_back({flight->fill, flight->generation, 0, error});
    gathered.moving = copies == Copies::moving;
    if (copies != Copies::over && copies != Copies::failed) break;
    gathered.landed = true;
    wait = Wait{0};
    if (lane.flights.empty() || lane.flights.front() != flight) continue;
    lane.flights.pop_front();
    if (copies == Copies::failed) {
      lane.load.lost(flight->bytes);
      if (lane.error.empty()) lane.error = why.empty() ? "the route gave no reason" : why;
      begin_again(flight);
      continue;
    }
    lane.load.landed(flight->bytes, Clock::now());
    lane.carried += flight->bytes;
    if (!flight->urgent) not_urgent_ -= flight->bytes;
    event.reset();
    if (flight->event) spare_events_.push_back(std::move(flight->event));
    if (crossing)
      for (const Copy& copy : flight->copies)
        arena_.device()->driver().peer_wrote(copy.to, copy.bytes);
    news_.push_back({flight->fill, flight->generation, flight->bytes, nullptr});
    lock.unlock();
    crossing.reset();
    flight.reset();  // without the lock: returning its chunk takes the lock of the staging pool
    lock.lock();
  }
  return gathered;
}

Uploads::Copies Uploads::look(Crossing& crossing, Wait wait, std::string* why) {
  switch (crossing.look(Clock::now() + wait, why)) {
    case Crossing::State::arrived: return Copies::over;
    case Crossing::State::failed: return Copies::failed;
    case Crossing::State::moving: break;
  }
  return Copies::moving;
}

// Returns whether the copies have left the chunk. If the event fails, waits for the stream instead.
// A lost device no longer reads the chunk, so its copies count as over.
Uploads::Copies Uploads::look(const Event* event, Wait wait, std::exception_ptr& error) {
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
