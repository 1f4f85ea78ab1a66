// Loads layers, chunk by chunk, to the device or to the host cache.
//
// A queued load holds no granules. A loader thread starts it: it makes room and takes granules. All
// loader threads copy its chunks. The thread that sends the last chunk maps the granules. Then the
// load completes, or it is undone. While a load waits for room, no load behind it is started. A
// load that is cancelled or preempted stops between two chunks.
//
// A load to the host cache takes an image instead of granules, and nothing is mapped.
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
#include "model/host_cache.h"
#include "model/mapping.h"

namespace warmserve {

// Throws cancelled if no ticket wants the work any more.
inline void give_up_if(bool unwanted) {
  if (unwanted) throw Error(ErrorKind::cancelled, "no ticket wants this work any more");
}

class Loader {
  using Phase = LayerLoad::Phase;
  using Verdict = LayerLoad::Verdict;

 public:
  struct Options {
    unsigned loaders = 1;  // threads; 0: pump
    std::chrono::milliseconds staging_timeout{0};
    double background_share = 0;       // see LoadQueue
    std::uint64_t read_bandwidth = 0;  // bytes per second of all threads together; 0: no limit
  };
  Loader(SharedState& state, StagingPool& staging, HostCache& host_cache, const Options& options);
  ~Loader();
  Loader(const Loader&) = delete;

  // Returns true if there are no loader threads: waiters must call step().
  bool pump(const Lock&) const noexcept { return pump_; }

  // Queues loads of the layers that the ticket wants and that are not resident; joins loads that
  // exist. The ticket is done when all these layers are resident and the model that it swaps out is
  // evicted.
  void request(const Lock&, const TicketPtr& ticket);
  // Returns whether the granules that the ticket's layers need, beside those of all queued loads,
  // are free or can be freed by the evictions that the ticket allows.
  bool has_room(const Lock&, const Ticket& ticket);
  // See LoadQueue.
  void drop(const Lock& lock, const TicketPtr& ticket, std::exception_ptr why) {
    queue_.drop(lock, ticket, why);
  }
  void drop_layers(const Lock& lock, const Selection& selection, std::exception_ptr why) {
    queue_.drop_layers(lock, selection, false, why);
  }
  void drop_host_layers(const Lock& lock, const Selection& selection, std::exception_ptr why) {
    queue_.drop_layers(lock, selection, true, why);
  }
  // Ends every ticket that has still to evict the model that it swaps out.
  void drop_swaps(const Lock&, std::exception_ptr why);

  // Returns whether all copies of the layer's load are enqueued, so that a stream can wait for
  // them.
  static bool sent(const Lock&, const Layer& layer) {
    const LayerLoad* load = layer.load;
    return load && load->phase == Phase::arriving && !load->unwanted();
  }
  // Precondition: sent(). See CopyEngine.
  std::optional<CopyEngine::Events> copies(const Lock&, const Layer& layer) {
    return copy_engine_.events(layer.load);
  }

  // Routes for foreground loads; see CopyEngine.
  void add_route(const RoutePtr& route) { copy_engine_.add_route(route); }
  void drop_route(const std::string& name) { copy_engine_.drop_route(name); }
  std::vector<RouteState> routes() { return copy_engine_.routes(); }

  // Does one step: loads one chunk of a load, starts or undoes a load, accounts for copies, or
  // evicts a model that is swapped out. Returns false if no step is possible now. Blocks until the
  // step is done.
  bool step();
  void check_invariants(const Lock& lock) const { queue_.check_invariants(lock); }
  // Ends the loader threads, each after its current chunk. Idempotent. Blocks.
  void stop();
  // Ends the loads to the host cache that no ticket wants. Precondition: stop() was called.
  void erase_host_loads(const Lock& lock) { queue_.erase_host_loads(lock); }
  // Releases the resources of copies. Precondition: stop() was called and all loads have ended.
  void release() { copy_engine_.release(); }

 private:
  enum class Room { enough, later, never };

  void run();
  bool step_once(Lock& lock);
  LoadQueue::Visited step_load(Lock& lock, LayerLoad& load);
  Room find_room(const Lock&, LayerLoad& load, std::vector<Layer*>& victims);
  bool evicts_behind_another(const LayerLoad& load) const;
  void start(Lock& lock, LayerLoad& load, const std::vector<Layer*>& victims);
  void choose_source(const Lock& lock, LayerLoad& load);
  LoadQueue::Visited start_to_host(Lock& lock, LayerLoad& load);
  std::uint64_t read_into_image(const LayerLoad& load, std::uint64_t begin, std::uint64_t end,
                                Deadline not_before, std::span<std::uint64_t> sums);
  void copy_chunk(Lock& lock, LayerLoad& load);
  void map(Lock& lock, LayerLoad& load);
  std::uint64_t write_through_host_view(const LayerLoad& load, std::uint64_t begin,
                                        std::uint64_t end, Deadline not_before,
                                        std::span<std::uint64_t> sums);
  std::exception_ptr wrong_content(const LayerLoad& load) const;
  bool account_completions(Lock& lock, bool wait);
  void arrived(const Lock& lock, LayerLoad& load, std::uint64_t bytes);
  void complete_if_all_arrived(const Lock& lock, LayerLoad& load);
  void undo(Lock& lock, LayerLoad& load);
  void start_again(const Lock& lock, LayerLoad& load);
  void complete(const Lock& lock, LayerLoad& load);
  void abandon(const Lock& lock, LayerLoad& load, Verdict why);
  void fail(const Lock& lock, LayerLoad& load, std::exception_ptr error);
  void on_error(const Lock& lock, LayerLoad& load, unsigned generation, std::exception_ptr error);
  void finish_ticket(const Lock& lock, const TicketPtr& ticket);
  bool finish_swap(Lock& lock);

  SharedState& state_;
  HostCache& host_cache_;
  const std::uint64_t chunk_bytes_;
  CopyEngine copy_engine_;

  // Under the runtime's lock.
  bool pump_, stopping_ = false;
  LoadQueue queue_;
  Pace pace_;
  std::vector<const LayerLoad*> evicting_;  // the loads that evict layers for their room now
  // Whether a thread sends bytes of an image for a background load, and for a foreground load.
  bool sending_image_[2] = {};
  bool host_room_wanted_ = false;   // a load to the host cache waits for memory that is pinned
  std::deque<TicketPtr> swapping_;  // loaded, but the model that they swap out is not evicted yet

  std::vector<std::thread> threads_;  // last: they use all members above
};

}  // namespace warmserve
