// The work of filling layers, a chunk at a time.
//
// A fill is queued, holding nothing; started by a loader, which makes room and maps; copied in
// chunks, by as many loaders as there are; and complete, or undone. A fill that waits for room
// keeps those behind it from taking granules. What is called off, or has to give way, does so
// between two chunks.
//
// With pump there are no loader threads: step() is all there is.
#pragma once

#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "load/fill_queue.h"
#include "load/pace.h"
#include "load/uploads.h"
#include "model/backing.h"

namespace warmserve {

class Transfer {
 public:
  struct Options {
    unsigned loaders = 1;  // 0: pump
    std::chrono::milliseconds staging_timeout{0};
    double background_share = 0;       // see FillQueue
    std::uint64_t read_bandwidth = 0;  // bytes a second of all loaders together; 0: no limit
  };
  Transfer(Books& books, StagingPool& staging, const Options& options);
  ~Transfer();
  Transfer(const Transfer&) = delete;

  // No loaders (left): whoever waits steps.
  bool pump(const Lock&) const noexcept { return pump_; }

  // Begins to fill what is missing of what the ticket wants; joins the fills under way. The ticket
  // is done when that is resident, and what it swaps out is gone.
  void request(const Lock&, const TicketPtr& ticket);
  // See FillQueue.
  void drop(const Lock& lock, const TicketPtr& ticket, std::exception_ptr why) {
    queue_.drop(lock, ticket, why);
  }
  void drop_layers(const Lock& lock, const Selection& selection, std::exception_ptr why) {
    queue_.drop_layers(lock, selection, why);
  }
  // Ends every ticket that has still to evict what it swaps out.
  void drop_swaps(const Lock&, std::exception_ptr why);

  // Whether all copies of the layer's fill are under way: a stream can be put behind them.
  static bool sent(const Lock&, const Layer& layer) {
    const Fill* fill = layer.fill;
    return fill && fill->sent == fill->span && fill->mapped && !fill->unwanted();
  }
  // Pre-condition: sent(). See Uploads.
  std::optional<Uploads::Events> copies(const Lock&, const Layer& layer) {
    return uploads_.events(layer.fill);
  }

  // Other ways for the bytes of foreground loads; see Uploads.
  void add(RoutePtr route) { uploads_.add(std::move(route)); }
  void drop_route(const std::string& name) { uploads_.drop(name); }
  std::vector<RouteState> routes() { return uploads_.routes(); }

  // One chunk of one transfer, or one step of making room for it. False: nothing can be done now.
  // Blocks as long as that takes.
  bool step();
  void check_invariants(const Lock& lock) const { queue_.check_invariants(lock); }
  // Ends the loaders, each after the chunk it is at. Idempotent.
  void stop();
  // After stop() and the end of all fills: gives back what copies needed.
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
  std::deque<TicketPtr> swapping_;  // loaded; what they swap out has still to go

  std::vector<std::thread> loaders_;  // last: they use all above
};

}  // namespace warmserve
