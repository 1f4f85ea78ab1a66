// Bytes that reach a granule by way of staging: read into a chunk, copied on a stream.
//
// Used where the CPU cannot write granules. Copies go over the device's own link, and what is
// urgent over those of neighbours too, where there are routes: each chunk over the link that will
// have carried it first. What a route fails to carry goes over the own link, from the same chunk.
// Several loaders may send at once; whoever calls
// collect() learns what has become of it, whoever sent it. Copies cannot be taken back: of what is
// not urgent no more than a chunk's bytes are under way at a time, so whatever is urgent, or called
// off, waits for no more than that. What is urgent goes as far ahead as there are chunks.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "load/link_load.h"
#include "load/route.h"
#include "memory/staging.h"
#include "model/model.h"

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
    std::span<std::uint64_t> sums;        // see add_to_digests
  };

  Uploads(const Arena& arena, StagingPool& staging, std::chrono::milliseconds staging_timeout)
      : arena_(arena), staging_(staging), staging_timeout_(staging_timeout) {}

  // From now on a way for what is urgent. Throws invalid_argument for a name that is there.
  void add(RoutePtr route);
  // It takes nothing more, and is let go when what is under way on it is over. Throws
  // invalid_argument for a name that is not there.
  void drop(const std::string& route);
  std::vector<RouteState> routes();

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
  // Nothing, where one of the copies has no event, as those of routes have none.
  std::optional<Events> events(const Fill* fill);
  // Gives back stream, events and routes. Pre-condition: nothing is under way, and nothing will be.
  void release();

 private:
  struct Flight {
    Fill* fill;
    unsigned generation;
    std::uint64_t bytes;
    bool urgent;
    std::shared_ptr<StagingPool::Chunk> chunk;
    std::vector<Copy> copies;
    std::shared_ptr<Event> event{};  // null when recording failed: the stream must be waited for
    std::shared_ptr<Crossing> crossing{};  // on a route; then there is no event
  };
  using FlightPtr = std::shared_ptr<Flight>;
  struct Lane {
    RoutePtr route;                   // null: the own link
    std::deque<FlightPtr> flights{};  // in the order they were sent
    LinkLoad load{};
    std::uint64_t carried = 0;
    std::string error{};   // why it takes no more
    bool dropped = false;  // goes with its last flight

    bool takes() const { return !dropped && error.empty(); }
  };
  using LanePtr = std::shared_ptr<Lane>;

  enum class Copies { over, moving, stuck, failed };

  StagingPool::Chunk chunk();
  std::vector<Copy> copies_of(const Layer& layer, std::uint64_t begin, std::uint64_t bytes,
                              const std::byte* from) const;
  bool send_piece(const FlightPtr& flight, Deadline deadline, const Terms& terms);
  bool begin(const FlightPtr& flight);
  void begin_on_own_link(const FlightPtr& flight);
  void begin_again(const FlightPtr& flight);
  std::exception_ptr enqueue(Flight& flight);
  std::shared_ptr<Event> spare_event();
  struct Gathered {
    bool landed = false;  // some copies are over
    bool moving = false;  // others will be, without anybody's help
  };
  using Wait = std::chrono::microseconds;  // 0: none
  Gathered gather(bool wait);
  Gathered gather(std::unique_lock<std::mutex>& lock, Lane& lane, Wait wait);
  static Copies look(Crossing& crossing, Wait wait, std::string* why);
  Copies look(const Event* event, Wait wait, std::exception_ptr& error);

  const Arena& arena_;
  StagingPool& staging_;
  const std::chrono::milliseconds staging_timeout_;

  std::mutex mutex_;  // guards all below; held over enqueueing, which does not block
  std::unique_ptr<Stream> stream_;
  std::vector<std::shared_ptr<Event>> spare_events_;
  std::vector<LanePtr> lanes_{std::make_shared<Lane>()};  // the first is the own link
  std::uint64_t not_urgent_ = 0;                          // bytes under way, all on the own link
  std::vector<News> news_;
};

}  // namespace warmserve
