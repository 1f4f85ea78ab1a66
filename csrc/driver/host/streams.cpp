#include "driver/host/streams.h"

#include <system_error>
#include <utility>
#include <vector>

#include "base/os_failure.h"

namespace warmserve {

HostStreams::~HostStreams() {
  for (auto& [id, stream] : streams_) {
    {
      Lock lock(mutex_);
      stream->stop = true;
      moved_.notify_all();
    }
    if (stream->thread.joinable()) stream->thread.join();
  }
}

std::shared_ptr<HostStreams::Stream> HostStreams::find(StreamId stream) {
  const auto found = streams_.find(static_cast<std::uint64_t>(stream));
  return found == streams_.end() ? nullptr : found->second;
}

Status HostStreams::stream_create(StreamId* out, std::string* why) {
  auto stream = std::make_shared<Stream>();
  if (threads_) {
    try {
      stream->thread = std::thread(&HostStreams::run, this, stream);
    } catch (const std::system_error& error) {
      *why = os_failure("starting a thread for a stream", error.code().value(), OsLimit::threads);
      return Status::failed;
    }
  }
  Lock lock(mutex_);
  streams_.emplace(next_id_, std::move(stream));
  *out = StreamId{next_id_++};
  return Status::ok;
}

Status HostStreams::stream_destroy(StreamId id) {
  std::shared_ptr<Stream> stream;
  {
    Lock lock(mutex_);
    stream = find(id);
    if (!stream) return Status::invalid;
    if (!stream->queue.empty() || stream->running) return Status::not_ready;
    stream->stop = true;
    streams_.erase(static_cast<std::uint64_t>(id));
    moved_.notify_all();
  }
  if (stream->thread.joinable()) stream->thread.join();
  return Status::ok;
}

void HostStreams::push(Stream& stream, Operation operation) {
  stream.queue.push_back(std::move(operation));
  if (threads_) moved_.notify_all();
}

Status HostStreams::enqueue(StreamId id, std::function<void()> work) {
  Lock lock(mutex_);
  const auto stream = find(id);
  if (!stream) return Status::invalid;
  push(*stream, {std::move(work), nullptr, nullptr});
  return Status::ok;
}

Status HostStreams::stream_wait_event(StreamId id, EventId event) {
  Lock lock(mutex_);
  const auto stream = find(id);
  const auto found = events_.find(static_cast<std::uint64_t>(event));
  if (!stream || found == events_.end()) return Status::invalid;
  if (found->second) push(*stream, {nullptr, found->second, nullptr});
  return Status::ok;
}

Status HostStreams::event_create(EventId* out) {
  Lock lock(mutex_);
  events_.emplace(next_id_, nullptr);
  *out = EventId{next_id_++};
  return Status::ok;
}

Status HostStreams::event_destroy(EventId event) {
  Lock lock(mutex_);
  return events_.erase(static_cast<std::uint64_t>(event)) ? Status::ok : Status::invalid;
}

Status HostStreams::event_record(EventId event, StreamId id) {
  Lock lock(mutex_);
  const auto stream = find(id);
  const auto found = events_.find(static_cast<std::uint64_t>(event));
  if (!stream || found == events_.end()) return Status::invalid;
  found->second = std::make_shared<Mark>();
  found->second->stream = stream;
  push(*stream, {nullptr, nullptr, found->second});
  return Status::ok;
}

Status HostStreams::event_query(EventId event) {
  Lock lock(mutex_);
  const auto found = events_.find(static_cast<std::uint64_t>(event));
  if (found == events_.end()) return Status::invalid;
  return !found->second || found->second->reached ? Status::ok : Status::not_ready;
}

Status HostStreams::event_wait(EventId event, std::chrono::microseconds timeout) {
  Lock lock(mutex_);
  const auto found = events_.find(static_cast<std::uint64_t>(event));
  if (found == events_.end()) return Status::invalid;
  const std::shared_ptr<Mark> mark = found->second;
  if (!mark) return Status::ok;
  const bool reached =
      threads_ ? moved_.wait_for(lock, timeout, [&] { return mark->reached; }) : drive(lock, mark);
  return reached ? Status::ok : Status::not_ready;
}

Status HostStreams::stream_synchronize(StreamId id) {
  Lock lock(mutex_);
  const auto stream = find(id);
  if (!stream) return Status::invalid;
  if (threads_) {
    moved_.wait(lock, [&] { return stream->queue.empty() && !stream->running; });
    return Status::ok;
  }
  while (stream->running || !stream->queue.empty()) {
    if (stream->running) {
      moved_.wait(lock);
      continue;
    }
    const auto blocker = stream->queue.front().wait_for;
    if (blocker && !drive(lock, blocker)) return Status::failed;
    step(lock, *stream);
  }
  return Status::ok;
}

Status HostStreams::synchronize_all() {
  std::vector<StreamId> all;
  {
    Lock lock(mutex_);
    for (const auto& [id, stream] : streams_) all.push_back(StreamId{id});
  }
  for (const StreamId id : all) {
    const Status status = stream_synchronize(id);
    if (status != Status::ok && status != Status::invalid) return status;  // invalid: destroyed
  }
  return Status::ok;
}

Status HostStreams::stream_step(StreamId id) {
  Lock lock(mutex_);
  const auto stream = find(id);
  if (!stream || threads_) return Status::invalid;
  return step(lock, *stream) ? Status::ok : Status::not_ready;
}

// Runs the stream's next operation if it has one that may run. Drops the lock during the work.
bool HostStreams::step(Lock& lock, Stream& stream) {
  if (stream.queue.empty() || stream.running) return false;
  const Operation& next = stream.queue.front();
  if (next.wait_for && !next.wait_for->reached) return false;
  const Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  if (operation.work) {
    stream.running = true;
    lock.unlock();
    operation.work();
    lock.lock();
    stream.running = false;
  }
  if (operation.reach) operation.reach->reached = true;
  moved_.notify_all();
  return true;
}

// Without threads: runs the operations that the mark depends on, on its stream and on the streams
// that it waits for.
bool HostStreams::drive(Lock& lock, const std::shared_ptr<Mark>& mark) {
  while (!mark->reached) {
    const auto stream = mark->stream.lock();
    if (!stream) return false;
    if (stream->running) {
      moved_.wait(lock);
      continue;
    }
    if (stream->queue.empty()) return false;
    const auto blocker = stream->queue.front().wait_for;
    if (blocker && !drive(lock, blocker)) return false;
    step(lock, *stream);
  }
  return true;
}

void HostStreams::run(std::shared_ptr<Stream> stream) {
  Lock lock(mutex_);
  for (;;) {
    if (step(lock, *stream)) continue;
    if (stream->stop) return;
    moved_.wait(lock);
  }
}

}  // namespace warmserve
