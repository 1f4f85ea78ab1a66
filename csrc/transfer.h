// The queue of layers to be filled, and the work of filling them, a chunk at a time.
//
// A Fill is one layer's journey to resident, shared by every ticket that wants it. It is queued,
// holding nothing; started by a loader, which makes room and maps; copied in chunks, by as many
// loaders as there are; and complete, or undone. Higher priority first, then older; a fill that
// waits for room keeps those behind it from taking granules.
//
// With pump there are no loader threads: step() is all there is.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "backing.h"
#include "ticket.h"
#include "uploads.h"

namespace warmserve {

struct Fill {
  enum class Phase { queued, starting, copying, undoing };

  Layer* layer;
  ModelPtr model;  // keeps the layer
  int priority;
  std::uint64_t sequence;
  std::vector<TicketPtr> tickets{};  // none: nobody wants it any more
  Phase phase = Phase::queued;
  bool give_way = false;        // its granules are wanted by a fill before it: start again later
  std::uint64_t next = 0;       // first byte not handed to a loader
  std::uint64_t done = 0;       // bytes arrived
  std::uint32_t in_flight = 0;  // chunks handed out and not arrived
  bool failed = false;          // what was copied is not to be used
};

class Transfer {
 public:
  struct Options {
    unsigned loaders = 1;  // 0: pump
    std::chrono::milliseconds staging_timeout{0};
  };
  Transfer(Books& books, StagingPool& staging, const Options& options);
  ~Transfer();
  Transfer(const Transfer&) = delete;

  // No loaders (left): whoever waits steps.
  bool pump(const Lock&) const noexcept { return pump_; }

  // Begins to fill all layers of the models that are not resident; joins the fills under way. The
  // ticket is done when they are, and what it swaps out is gone.
  void request(const Lock&, const TicketPtr& ticket, const std::vector<ModelPtr>& models);
  // Ends the ticket with `why`; layers that nobody else wants are undone, those arrived stay.
  void drop(const Lock&, const TicketPtr& ticket, std::exception_ptr why);
  // Ends every ticket that waits for a layer of the model.
  void drop_model(const Lock&, Model& model, std::exception_ptr why);

  // Ends every ticket that has still to evict what it swaps out.
  void drop_swaps(const Lock&, std::exception_ptr why);

  // One chunk of one transfer, or one step of making room for it. False: nothing can be done now.
  // Blocks as long as that takes.
  bool step();
  // Ends the loaders, each after the chunk it is at. Idempotent.
  void stop();
  // After stop() and the end of all fills: gives back what copies needed.
  void release() { uploads_.release(); }

 private:
  enum class Room { enough, later, never };
  using Key = std::pair<int, std::uint64_t>;  // minus priority, sequence

  void run();
  void enlist(const Lock&, const TicketPtr& ticket, const ModelPtr& model);
  bool advance(Lock& lock);
  bool advance(Lock& lock, Fill& fill, bool& room_blocked);
  Room find_room(const Lock&, Fill& fill, std::vector<Layer*>& victims);
  void start(Lock& lock, Fill& fill, const std::vector<Layer*>& victims);
  void copy_chunk(Lock& lock, Fill& fill);
  void write_through_host_view(const Fill& fill, std::uint64_t begin, std::uint64_t end);
  bool collect(Lock& lock, bool wait);
  void arrived(const Lock& lock, Fill& fill, std::uint64_t bytes);
  void undo(Lock& lock, Fill& fill);
  void complete(const Lock& lock, Fill& fill);
  void fail(const Lock& lock, Fill& fill, std::exception_ptr error);
  void forget(const Lock&, Fill& fill);
  void settle(const Lock& lock, const TicketPtr& ticket);
  void finish_swap(Lock& lock);
  std::uint64_t span(const Fill& fill) const;

  Books& books_;
  const std::uint64_t chunk_bytes_;
  Uploads uploads_;

  // Under the runtime's lock.
  bool pump_, stopping_ = false;
  std::map<Key, std::unique_ptr<Fill>> order_;
  std::uint64_t sequence_ = 0;
  std::deque<TicketPtr> swapping_;  // loaded; what they swap out has still to go

  std::vector<std::thread> loaders_;  // last: they use all above
};

}  // namespace warmserve
