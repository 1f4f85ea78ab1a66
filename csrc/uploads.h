// Bytes that reach a granule by way of staging: read into a chunk, copied on a stream.
//
// Used where the CPU cannot write granules. Several loaders may send at once; whoever calls
// collect() learns what has become of it, whoever sent it. Copies cannot be taken back: of what is
// not urgent no more than a chunk's bytes are under way at a time, so whatever is urgent, or called
// off, waits for no more than that. What is urgent goes as far ahead as there are chunks.
#pragma once

#include <deque>
#include <functional>
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
    unsigned generation;  // of the fill, when it was sent
    std::uint64_t bytes;
    std::exception_ptr error;  // null: the copies are over
  };
  using Events = std::vector<std::shared_ptr<Event>>;
  struct Terms {
    unsigned generation;
    bool urgent;
    Deadline not_before;                  // nothing is copied earlier
    const std::function<bool()>& wanted;  // asked before each piece, without a lock
  };

  Uploads(const Arena& arena, StagingPool& staging, std::chrono::milliseconds staging_timeout)
      : arena_(arena), staging_(staging), staging_timeout_(staging_timeout) {}

  // Sends layer bytes [begin, end), at most a chunk, to the layer's granules; returns how many it
  // sent, which are the caller's again with the news that their copies are over. Throws when
  // nothing was sent. Blocks for a chunk, the file, and what is under way.
  std::uint64_t send(Fill* fill, const Model& model, const Layer& layer, std::uint64_t begin,
                     std::uint64_t end, const Terms& terms);
  // The news since. With `wait`, and if there is none, blocks a poll interval for the oldest copy;
  // `moving` then says whether it is on its way all the same.
  std::vector<News> collect(bool wait, bool* moving = nullptr);
  bool under_way();
  // What a stream has to wait for to be behind all that was sent for the fill and is not over.
  // Nothing, where one of the copies has no event.
  std::optional<Events> events(const Fill* fill);
  // Gives back stream and events. Pre-condition: nothing is under way, and nothing will be.
  void release();

 private:
  struct Flight {
    Fill* fill;
    unsigned generation;
    std::uint64_t bytes;
    bool urgent;
    std::shared_ptr<StagingPool::Chunk> chunk;
    std::shared_ptr<Event> event;  // null when recording failed: the stream must be waited for
  };
  using FlightPtr = std::shared_ptr<Flight>;

  enum class Copies { over, moving, stuck };

  StagingPool::Chunk chunk();
  bool send_piece(const FlightPtr& flight, const Layer& layer, std::uint64_t begin,
                  const std::byte* bytes, Deadline deadline, const Terms& terms);
  std::exception_ptr enqueue(Flight& flight, const Layer& layer, std::uint64_t begin,
                             const std::byte* bytes);
  std::shared_ptr<Event> spare_event();
  struct Gathered {
    bool landed = false;  // some copies are over
    bool moving = false;  // others will be, without anybody's help
  };
  Gathered gather(bool wait);
  Copies look(const Event* event, bool wait, std::exception_ptr& error);

  const Arena& arena_;
  StagingPool& staging_;
  const std::chrono::milliseconds staging_timeout_;

  std::mutex mutex_;  // guards all below; held over enqueueing, which does not block
  std::unique_ptr<Stream> stream_;
  std::vector<std::shared_ptr<Event>> spare_events_;
  std::deque<FlightPtr> flights_;
  std::uint64_t not_urgent_ = 0;  // bytes in flights
  std::vector<News> news_;
};

}  // namespace warmserve
