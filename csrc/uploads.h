// Bytes that reach a granule by way of staging: read into a chunk, copied on a stream.
//
// Used where the CPU cannot write granules. Several loaders may send at once; whoever calls
// collect() learns what has become of it, whoever sent it.
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
  // What became of something sent: an error, told once and at once; and, later in that case, that
  // its copies are over and its granules the caller's again.
  struct News {
    Fill* fill;
    std::uint64_t bytes;
    std::exception_ptr error;  // null: the copies are over
  };

  Uploads(const Arena& arena, StagingPool& staging, std::chrono::milliseconds staging_timeout)
      : arena_(arena), staging_(staging), staging_timeout_(staging_timeout) {}

  // Sends layer bytes [begin, end), at most a chunk, to the layer's granules; they are the caller's
  // until the news that the copies are over. Throws when nothing was sent. Blocks for a chunk and
  // the file.
  void send(Fill* fill, const Model& model, const Layer& layer, std::uint64_t begin,
            std::uint64_t end);
  // The news since. With `wait`, and if there is none, blocks a poll interval for the oldest copy;
  // `moving` then says whether it is on its way all the same.
  std::vector<News> collect(bool wait, bool* moving = nullptr);
  bool under_way();
  // Gives back stream and events. Pre-condition: nothing is under way, and nothing will be.
  void release();

 private:
  struct Flight {
    Fill* fill;
    std::uint64_t bytes;
    StagingPool::Chunk chunk;
    std::optional<Event> event;  // absent when recording failed: the stream must be waited for
  };

  enum class Copies { over, moving, stuck };

  StagingPool::Chunk chunk();
  std::exception_ptr enqueue(Flight& flight, const Layer& layer, std::uint64_t begin,
                             std::uint64_t end);
  bool gather(bool wait);
  Copies look(Flight& flight, bool wait, std::exception_ptr& error);

  const Arena& arena_;
  StagingPool& staging_;
  const std::chrono::milliseconds staging_timeout_;

  std::mutex mutex_;  // guards all below; held over enqueueing, which does not block
  std::unique_ptr<Stream> stream_;
  std::vector<Event> spare_events_;
  std::deque<Flight> flights_;
  std::vector<News> news_;
};

}  // namespace warmserve
