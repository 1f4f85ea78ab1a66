// Fills layers, chunk by chunk.
//
// A queued fill holds no granules. A loader starts it: it makes room and takes granules. All
// loaders copy its chunks. The loader that sends the last chunk maps the granules. Then the fill
// completes, or it is undone. While a fill waits for room, no fill behind it is started. A fill
// that is cancelled, or has to give way, stops between two chunks.
//
// With pump there are no loader threads; only step() makes progress.
#pragma once

#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "load/copy_engine.h"
#include "load/load_queue.h"
#include "load/pace.h"
#include "model/mapping.h"

namespace warmserve {

class Transfer {
 public:
  struct Options {
    unsigned loaders = 1;  // 0: pump
    std::chrono::milliseconds staging_timeout{0};
    double background_share = 0;       // see FillQueue
    std::uint64_t read_bandwidth = 0;  // bytes per second of all loaders together; 0: no limit
  };
  Transfer(Books& books, StagingPool& staging, const Options& options);
  ~Transfer();
  Transfer(const Transfer&) = delete;

  // Returns true if there are no loader threads: waiters must call step().
  bool pump(const Lock&) const noexcept { return pump_; }

  // Queues fills of the layers that the ticket wants and that are not resident; joins fills that
  // exist. The ticket is done when all these layers are resident and the model that it swaps out is
  // evicted.
  void request(const Lock&, const TicketPtr& ticket);
  // See FillQueue.
  void drop(const Lock& lock, const TicketPtr& ticket, std::exception_ptr why) {
    queue_.drop(lock, ticket, why);
  }
  void drop_layers(const Lock& lock, const Selection& selection, std::exception_ptr why) {
    queue_.drop_layers(lock, selection, why);
  }
  // Ends every ticket that has still to evict the model that it swaps out.
  void drop_swaps(const Lock&, std::exception_ptr why);

  // Returns whether all copies of the layer's fill are enqueued, so that a stream can wait for
  // them.
  static bool sent(const Lock&, const Layer& layer) {
    const Fill* fill = layer.fill;
    return fill && fill->sent == fill->span && fill->mapped && !fill->unwanted();
  }
  // Precondition: sent(). See Uploads.
  std::optional<Uploads::Events> copies(const Lock&, const Layer& layer) {
    return uploads_.events(layer.fill);
  }

  // Routes for foreground loads; see Uploads.
  void add(RoutePtr route) { uploads_.add(std::move(route)); }
  void drop_route(const std::string& name) { uploads_.drop(name); }
  std::vector<RouteState> routes() { return uploads_.routes(); }

  // Does one step: loads one chunk of a fill, starts or undoes a fill, accounts for copies, or
  // evicts a model that is swapped out. Returns false if no step is possible now. Blocks until the
  // step is done.
  bool step();
  void check_invariants(const Lock& lock) const { queue_.check_invariants(lock); }
  // Ends the loader threads, each after its current chunk. Idempotent. Blocks.
  void stop();
  // Releases the resources of copies. Precondition: stop() was called and all fills have ended.
  void release() { uploads_.release(); }

 private:
  using Phase = Fill::Phase;
  enum class Room { enough, later, never };

  void run();
  bool advance(Lock& lock);
  FillQueue::Visited advance(Lock& lock, Fill& fill);
  Room find_room(const Lock&, Fill& fill, std::vector<Layer*>& victims);
  void start(Lock& lock, Fill& fill, const std::vector<Layer*>& victims);
  void copy_chunk(Lock& lock, Fill& fill);
  void map(Lock& lock, Fill& fill);
  std::uint64_t write_through_host_view(const Fill& fill, std::uint64_t begin, std::uint64_t end,
                                        Deadline not_before, std::span<std::uint64_t> sums);
  std::exception_ptr wrong_content(const Fill& fill) const;
  bool collect(Lock& lock, bool wait);
  void arrived(const Lock& lock, Fill& fill, std::uint64_t bytes);
  void complete_if_all_is_there(const Lock& lock, Fill& fill);
  void undo(Lock& lock, Fill& fill);
  void complete(const Lock& lock, Fill& fill);
  void give_up(const Lock& lock, Fill& fill);
  void fail(const Lock& lock, Fill& fill, std::exception_ptr error);
  void meet(const Lock& lock, Fill& fill, unsigned generation, std::exception_ptr error);
  void settle(const Lock& lock, const TicketPtr& ticket);
  bool finish_swap(Lock& lock);

  Books& books_;
  const std::uint64_t chunk_bytes_;
  Uploads uploads_;

  // Under the runtime's lock.
  bool pump_, stopping_ = false;
  FillQueue queue_;
  Pace pace_;
  std::deque<TicketPtr> swapping_;  // loaded, but the model that they swap out is not evicted yet

  std::vector<std::thread> loaders_;  // last: they use all members above
};

}  // namespace warmserve
