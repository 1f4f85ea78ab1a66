// Streams and events of the host device. A stream is a queue of closures that run in order: on its
// own thread, or, without threads, on the thread that steps the stream or waits for an event.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "driver/driver.h"

namespace warmserve {

class HostStreams {
 public:
  explicit HostStreams(bool threads) : threads_(threads) {}
  ~HostStreams();

  Status stream_create(StreamId* out, std::string* why);
  Status stream_destroy(StreamId stream);
  Status stream_synchronize(StreamId stream);
  Status synchronize_all();
  Status stream_wait_event(StreamId stream, EventId event);
  Status stream_step(StreamId stream);
  Status event_create(EventId* out);
  Status event_destroy(EventId event);
  Status event_record(EventId event, StreamId stream);
  Status event_query(EventId event);
  Status event_wait(EventId event, std::chrono::microseconds timeout);
  Status enqueue(StreamId stream, std::function<void()> work);

 private:
  struct Stream;
  // One recording of an event. A wait keeps the mark it began with, so a new recording of the event
  // does not affect it.
  struct Mark {
    bool reached = false;
    std::weak_ptr<Stream> stream;  // the stream that will reach the mark
  };
  struct Operation {
    std::function<void()> work;      // may be empty
    std::shared_ptr<Mark> wait_for;  // may be null
    std::shared_ptr<Mark> reach;     // may be null
  };
  struct Stream {
    std::deque<Operation> queue;
    bool running = false;  // an operation has left the queue and has not completed
    bool stop = false;
    std::thread thread;
  };
  using Lock = std::unique_lock<std::mutex>;

  std::shared_ptr<Stream> find(StreamId stream);
  void push(Stream& stream, Operation operation);
  void run(std::shared_ptr<Stream> stream);
  bool step(Lock& lock, Stream& stream);
  bool drive(Lock& lock, const std::shared_ptr<Mark>& mark);

  const bool threads_;
  std::mutex mutex_;  // guards all below; a leaf; released while work runs
  std::condition_variable moved_;
  std::uint64_t next_id_ = 1;
  std::unordered_map<std::uint64_t, std::shared_ptr<Stream>> streams_;
  std::unordered_map<std::uint64_t, std::shared_ptr<Mark>> events_;  // null: never recorded
};

}  // namespace warmserve
