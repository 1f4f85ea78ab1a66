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
//
// A client of a broker has no loader threads either: its loads are requests to the broker, and the
// thread that reads the broker's answers ends them.
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
  bool pump(const Lock&) const noexcept {
    return state_.broker ? !state_.broker->has_thread() : pump_;
  }

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

  // For a client: sends a request for each queued load, and cancels requests that no ticket wants.
  // Expires tickets. Wait-free.
  void ask_broker(const Lock& lock);
  // For a client: asks again for layers that the ticket, a lease, wants and that were asked for
  // less urgently.
  void ask_for_lease(const Lock& lock, const Ticket& ticket);
  struct Arrival {
    std::uint32_t layer;
    std::vector<SharedGranule> granules;
  };
  // For a client: maps layers whose granules the broker has filled, and completes their loads.
  // Returns the layers that no load waits for, which are not mapped. Drops the lock. Blocks.
  std::vector<std::uint32_t> arrive(Lock& lock, Model& model, std::span<const Arrival> arrivals);
  // For a client: ends the load of a layer for which the broker has answered this request with an
  // error.
  void refuse(const Lock& lock, Layer& layer, std::uint64_t request, std::exception_ptr error);
  // For a client: ends all loads that wait for the broker.
  void refuse_all(const Lock& lock, std::exception_ptr error);
  // For a client: loads a layer again that a ticket has lost before it was done.
  void want_again(const Lock& lock, const TicketPtr& ticket, Layer& layer, const ModelPtr& model) {
    queue_.add_again(lock, ticket, layer, model);
  }
  // For a client: queues the loads again that wait for a broker that has ended.
  void ask_again(const Lock& lock);
  // Evicts a model that a ticket swaps out, if one can be evicted now, and finishes the ticket.
  // Returns false if there is none. Drops the lock. Blocks.
  bool finish_swap(Lock& lock);
  Deadline next_deadline(const Lock&) const { return queue_.next_deadline(); }

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
  void start_remembered(Lock& lock, LayerLoad& load, std::vector<GranuleId> granules);
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
  void send_want(const Lock& lock, const Model& model, const Ticket& ticket,
                 const std::vector<LayerLoad*>& loads);
  void end_arrival(Lock& lock, LayerLoad& load, std::exception_ptr error);
  void finish_ticket(const Lock& lock, const TicketPtr& ticket);

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
