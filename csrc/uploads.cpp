#include "uploads.h"

#include <algorithm>
#include <utility>

#include "arena.h"

namespace warmserve {

// Waiting for a chunk, a loader collects: the chunks it waits for are those under way.
StagingPool::Chunk Uploads::chunk() {
  const Deadline deadline = Clock::now() + staging_timeout_;
  for (;;) {
    if (auto chunk = staging_.try_acquire()) return std::move(*chunk);
    gather(true);
    if (auto chunk = staging_.try_acquire()) return std::move(*chunk);
    try {
      return staging_.acquire(std::min(deadline, Clock::now() + kPollInterval), nullptr);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::staging_timeout || Clock::now() >= deadline) throw;
    }
  }
}

void Uploads::send(Fill* fill, const Model& model, const Layer& layer, std::uint64_t begin,
                   std::uint64_t end) {
  Flight flight{fill, end - begin, chunk(), std::nullopt};
  read_layer(model.files, layer.source, begin, end,
             {begin, staging_.chunk_bytes(), {flight.chunk.data()}});
  const std::lock_guard lock(mutex_);
  if (!stream_) stream_ = std::make_unique<Stream>(arena_.device(), StreamPriority::background);
  if (const auto error = enqueue(flight, layer, begin, end)) news_.push_back({fill, 0, error});
  flights_.push_back(std::move(flight));
}

// Neighbouring granules take one copy. Once a copy is under way an error is returned, not thrown:
// the flight goes on, for its chunk must stay until the stream has passed it.
std::exception_ptr Uploads::enqueue(Flight& flight, const Layer& layer, std::uint64_t begin,
                                    std::uint64_t end) {
  const std::uint64_t granule_bytes = arena_.granule_bytes();
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
                              flight.chunk.data() + (at - begin), stop - at);
      under_way = true;
      at = stop;
    }
    if (spare_events_.empty()) spare_events_.emplace_back(arena_.device());
    spare_events_.back().record(stream_->id());
    flight.event.emplace(std::move(spare_events_.back()));
    spare_events_.pop_back();
  } catch (...) {
    if (!under_way) throw;
    return std::current_exception();
  }
  return nullptr;
}

std::vector<Uploads::News> Uploads::collect(bool wait, bool* moving) {
  gather(false);
  std::unique_lock lock(mutex_);
  if (wait && news_.empty()) {
    lock.unlock();
    const bool more = gather(true);
    if (moving) *moving = more;
    lock.lock();
  }
  return std::exchange(news_, {});
}

bool Uploads::under_way() {
  const std::lock_guard lock(mutex_);
  return !flights_.empty() || !news_.empty();
}

void Uploads::release() {
  const std::lock_guard lock(mutex_);
  stream_.reset();
  spare_events_.clear();
}

// Whether copies are left that will be over without anybody's help.
bool Uploads::gather(bool wait) {
  std::unique_lock lock(mutex_);
  while (!flights_.empty()) {
    Flight flight = std::move(flights_.front());
    flights_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    const Copies copies = look(flight, wait, error);
    lock.lock();
    if (error) news_.push_back({flight.fill, 0, error});
    if (copies != Copies::over) {
      flights_.push_front(std::move(flight));
      return copies == Copies::moving;
    }
    wait = false;
    if (flight.event) spare_events_.push_back(std::move(*flight.event));
    news_.push_back({flight.fill, flight.bytes, nullptr});
  }
  return false;
}

// Whether the copies have left the chunk. Where the event fails, the stream is waited for; a device
// that is lost will not read the chunk any more.
Uploads::Copies Uploads::look(Flight& flight, bool wait, std::exception_ptr& error) {
  const Copies not_yet = arena_.device()->facts().threads ? Copies::moving : Copies::stuck;
  const auto lost = [](const Error& e) { return e.kind() == ErrorKind::device_lost; };
  if (flight.event) {
    try {
      if (flight.event->complete()) return Copies::over;
      if (!wait) return not_yet;
      flight.event->wait(Clock::now() + kPollInterval, nullptr);
      return Copies::over;
    } catch (const Error& caught) {
      if (caught.kind() == ErrorKind::timeout) return not_yet;
      error = std::current_exception();
      flight.event.reset();
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
