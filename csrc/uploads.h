// Bytes that reach a granule by way of staging: read into a chunk, copied on a stream.
//
// Used where the CPU cannot write granules. Several loaders may send at once; whoever calls
// collect() learns what has arrived, whoever sent it.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "model.h"
#include "staging.h"

namespace warmserve {

class Arena;

class Uploads {
 public:
  struct Arrival {
    Fill* fill;
    std::uint64_t bytes;
    std::exception_ptr error;  // null: they are there
  };

  Uploads(const Arena& arena, StagingPool& staging, std::chrono::milliseconds staging_timeout)
      : arena_(arena), staging_(staging), staging_timeout_(staging_timeout) {}

  // Sends layer bytes [begin, end), at most a chunk, to the layer's granules; they are the caller's
  // until the arrival is collected. Throws when nothing was sent. Blocks for a chunk and the file.
  void send(Fill* fill, const Model& model, const Layer& layer, std::uint64_t begin,
            std::uint64_t end);
  // What has arrived since. With `wait`, and if nothing has, blocks a poll interval for the oldest.
  std::vector<Arrival> collect(bool wait);
  bool under_way();

 private:
  struct Flight {
    Arrival arrival;
    StagingPool::Chunk chunk;
    std::optional<Event> event;  // absent when recording failed: the stream must be waited for
  };

  StagingPool::Chunk chunk();
  void enqueue(Flight& flight, const Layer& layer, std::uint64_t begin, std::uint64_t end);
  void gather(bool wait);
  bool over(Flight& flight, bool wait);

  const Arena& arena_;
  StagingPool& staging_;
  const std::chrono::milliseconds staging_timeout_;

  std::mutex mutex_;  // guards all below; held over enqueueing, which does not block
  std::unique_ptr<Stream> stream_;
  std::vector<Event> spare_events_;
  std::deque<Flight> flights_;
  std::vector<Arrival> arrived_;
};

}  // namespace warmserve
