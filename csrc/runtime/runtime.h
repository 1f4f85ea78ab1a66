// The runtime of one device: what bind/ offers to Python, and all a C++ user needs.
//
// Any thread may call anything. Each operation says what it guarantees when it throws:
//   strong     nothing has changed;
//   per layer  every layer is in a named state, and calling again goes on from there;
//   wait-free  never blocks; takes a lock that is never held over a call that may.
// In a process forked from the one that made the runtime every operation throws general. Once the
// device is lost all but those that only look or let go throw device_lost.
// Where it says "Blocks", `poll` is called while it does.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "load/transfer.h"
#include "model/layer_shape.h"
#include "runtime/lease.h"

namespace warmserve {

struct RuntimeOptions {
  std::uint64_t arena_bytes = 0, staging_bytes = 0;
  std::uint64_t granule_bytes = 2 * kMiB, chunk_bytes = 8 * kMiB;
  std::uint64_t headroom_bytes = 0;                   // of the device, left to the others in it
  unsigned loaders = 1;                               // threads; 0: pump
  std::chrono::milliseconds staging_timeout{30'000};  // longest wait of a load for a chunk
  bool poison = false;                                // evicted addresses stay readable, as NaN
  double background_share = 0.05;    // of the bytes moved while foreground loads wait, 0 to 1
  std::uint64_t read_bandwidth = 0;  // bytes a second that loads read, at most; 0: no limit
};

// What an eviction does about leases that are held, and about streams and passes that still use
// the layers after theirs have ended: says Busy, or waits.
enum class Patience { none, streams, leases_and_streams };

struct LayerState {
  Residency residency = Residency::absent;
  std::uint64_t bytes = 0;
  std::uint64_t granules = 0;
  std::uint32_t leases = 0;
  double keep_value = 0;
};
struct ModelState {
  std::string name;
  std::uint32_t leases = 0;
  std::uint64_t backing_epoch = 0;
  std::vector<LayerState> layers;
};
struct RuntimeState {
  std::uint64_t granule_bytes = 0, pinned_bytes = 0;
  std::uint64_t headroom_bytes = 0;
  std::uint32_t granules = 0, granules_free = 0, granules_uncreated = 0;
  std::size_t leases = 0, staging_chunks_free = 0;
  Counters counters;
  std::vector<RouteState> routes;
  std::vector<ModelState> models;
};

class Runtime {
 public:
  // As the constructor, for sharing; leaked, not destroyed, where the device is not usable (in a
  // forked child, and while the process exits).
  static std::shared_ptr<Runtime> make(std::shared_ptr<Driver> driver,
                                       const RuntimeOptions& options);
  // Throws invalid_argument, out_of_device_memory. Blocks while it makes the arena.
  Runtime(DevicePtr device, const RuntimeOptions& options);
  ~Runtime();  // as close(), as far as that goes
  Runtime(const Runtime&) = delete;

  const DevicePtr& device() const noexcept { return device_; }

  // Strong. Throws invalid_argument for a name that is taken. Blocks if digests are taken.
  ModelPtr register_model(const std::string& name, std::vector<File> files,
                          const std::vector<LayerShape>& layers, bool writable,
                          const Poll& poll = nullptr);
  // Gives a model other files, of layers of the same sizes, at the same addresses. Evicts it; until
  // that is done nothing has changed. Throws busy while leased, timeout, invalid_argument. Blocks.
  void reload(const ModelPtr& model, std::vector<File> files, const std::vector<LayerShape>& layers,
              Deadline deadline, const Poll& poll);
  // Per layer. Evicts; views keep the addresses. Throws busy or waits, as `patience` says, and
  // timeout. Blocks.
  void unregister(const ModelPtr& model, Deadline deadline, const Poll& poll,
                  Patience patience = Patience::streams);

  // Strong, wait-free. Loading happens later; the ticket tells how it went, per layer. Throws
  // out_of_device_memory for what could never fit, busy for what does not fit beside the leased,
  // invalid_argument for layers that are not there, none at all, and a deadline that has passed.
  TicketPtr prewarm(const Selection& selection, int priority, Deadline deadline = kNever);
  // As prewarm of `load`, in the granules of `evict`, which is absent when the ticket is done.
  // Throws busy while any layer of `evict` is leased.
  TicketPtr swap(const ModelPtr& evict, const ModelPtr& load, int priority);
  // Per layer. Gives up loading these layers; tickets for others too go on to those. Throws busy
  // or waits, as `patience` says, and timeout; busy where the calling thread would wait for a pass
  // of its own. Blocks.
  void evict(const Selection& selection, Deadline deadline, const Poll& poll,
             Patience patience = Patience::streams);
  // Gives free granules back to the driver; returns their bytes. Per granule. Blocks.
  std::uint64_t trim();
  // Wait-free. `value` for all layers of the model, or one.
  void stamp(const ModelPtr& model, double value);
  void stamp(const ModelPtr& model, std::uint32_t layer, double value);

  // Wait-free. Begins a lease; it is admitted once hold->entry is null or done without error, and
  // has all its layers once hold->ticket is, which is made no later. Throws out_of_device_memory,
  // busy for leases that would wait for each other, invalid_argument; then there is none.
  HoldPtr begin_lease(std::vector<Selection> wants, std::uint64_t owner);
  // A lease on what an admitted lease holds: admitted at once, whoever waits in line. Throws
  // stale_view unless that one is held. Wait-free.
  HoldPtr share_lease(const HoldPtr& hold, std::uint64_t owner);
  // Blocks until it is admitted and, with `all`, has all its layers. On a throw (timeout, a failed
  // load, what poll throws) it is left.
  void await_lease(const HoldPtr& hold, Deadline deadline, const Poll& poll, bool all = true);
  // The same in steps: whether there is nothing to wait for (any more); and wakes the token when
  // the next step is over, with false where there is none. Wait-free.
  bool ready(const HoldPtr& hold, bool all);
  bool notify(const HoldPtr& hold, bool all, const std::shared_ptr<Waker>& waker,
              std::uint64_t token);
  // Orders what comes after it behind the layer's arrival: blocks until the layer is there; with a
  // stream, until its copies are all under way, which the stream then waits for and the caller does
  // not. Without a hold, for whoever leases the layer. True: it is resident, and nothing else need
  // wait for it while it is held. Throws stale_view for what is not held or not in the lease,
  // timeout, and what loading the layer met.
  bool await_layer(const HoldPtr& hold, const ModelPtr& model, std::uint32_t layer,
                   const std::shared_ptr<Stream>& stream, Deadline deadline, const Poll& poll);
  // Begins a pass of the calling thread on what is leased of the model now: these layers stay until
  // it has ended, also when the leases end before. A pass may be begun within itself, and ends with
  // its outermost part. Null: nothing of the model is leased. `complete`: the pass holds every
  // layer, and all are resident. await_layer() and record() take a pass as they take a lease, but
  // throw stale_view for a layer whose lease ended before it arrived. Wait-free.
  struct Pass {
    HoldPtr hold;
    bool complete = false;
    std::uint64_t lease_epoch = 0;  // see leased()
  };
  Pass begin_pass(const ModelPtr& model);
  // Whether the lease is held and the layer is there for it: resident, or waited for. Wait-free.
  bool arrived(const HoldPtr& hold, const ModelPtr& model, std::uint32_t layer);
  // What the stream was given so far will run before the models are unmapped. Throws stale_view
  // unless the lease is held. Wait-free.
  void record(const HoldPtr& hold, const std::shared_ptr<Stream>& stream);
  // The same of what is leased of the model, for whoever leases it.
  void record(const ModelPtr& model, const std::shared_ptr<Stream>& stream);
  // Ends a lease or a pass. Wait-free; at once even where the lease was still waited for.
  // Idempotent for a lease.
  void end_lease(const HoldPtr& hold);

  bool done(const TicketPtr& ticket);
  std::pair<std::uint64_t, std::uint64_t> progress(const TicketPtr& ticket);  // bytes, of bytes
  std::pair<std::size_t, std::size_t> layers_left(const TicketPtr& ticket);   // of how many
  int fileno(const TicketPtr& ticket);  // readable when done; the ticket's
  // Wakes the token when the ticket is done. False: it is done.
  bool notify(const TicketPtr& ticket, const std::shared_ptr<Waker>& waker, std::uint64_t token);
  // Readable once a backing epoch has changed, until it is read; the runtime's.
  int fileno();
  // Whether every layer is held and resident; and, where any is held, a number other than 0 that
  // changes whenever a lease on the model begins or ends. Wait-free.
  std::pair<bool, std::uint64_t> leased(const ModelPtr& model);
  // Blocks until done; of a layer, until it is there. Throws timeout, the ticket's error, or what
  // poll throws; the work goes on.
  void wait(const TicketPtr& ticket, Deadline deadline, const Poll& poll);
  void wait(const TicketPtr& ticket, const ModelPtr& model, std::uint32_t layer, Deadline deadline,
            const Poll& poll);
  // Wait-free, idempotent. Layers that arrived stay.
  void cancel(const TicketPtr& ticket);

  // The model's addresses; made now if they were not. Strong.
  ReservationPtr reservation(const ModelPtr& model);
  // Copies a resident layer's bytes to `out`. Throws stale_view unless resident. Blocks.
  void read_back(const ModelPtr& model, std::uint32_t layer, std::byte* out);

  // A digest of each of its granules (kernels.h), made on the device. Throws as read_back, and
  // general where the device has no kernels. Blocks.
  std::vector<std::uint64_t> digest(const ModelPtr& model, std::uint32_t layer);

  // From now on foreground loads may go this way too, beside the device's own link. Throws
  // invalid_argument for a name that is taken, and where the CPU writes the device's memory itself.
  // Strong, wait-free.
  void add_route(RoutePtr route);
  // Also one that has failed. It takes nothing more and is let go when its last bytes are there.
  // Throws invalid_argument for a name that is not there.
  void drop_route(const std::string& name);

  RuntimeState state();
  bool step();
  void check_invariants();
  // Per layer. Ends loaders, evicts all, frees all. Throws busy or waits, as `patience` says, and
  // timeout: nothing has changed then. Throws general when the driver keeps something: calling
  // again goes on from there. Blocks.
  void close(const Poll& poll, Deadline deadline = kNever, Patience patience = Patience::streams);

 private:
  void enter() const;  // throws in another process than the one that made it
  Lock look();         // and when closed
  Lock open();         // and when the device is lost
  void require_registered(const Lock&, const Model& model) const;
  struct Remains {
    ReservationPtr reservation;
    std::vector<Use> uses;
  };
  Remains take_off(const Lock&, Model& model);
  ModelPtr make_model(const std::string& name, std::vector<File> files,
                      const std::vector<LayerShape>& layers, const Poll& poll) const;
  static Layer& layer_of(Model& model, std::uint32_t index);
  void check(const Lock&, const Selection& selection) const;
  void require_room(const Lock&, const Selection& selection, const std::string& what) const;
  void serve(const Lock& lock, const HoldPtr& hold);
  void await_entry(const HoldPtr& hold, Deadline deadline, const Poll& poll);
  static Ticket* awaited(const Lock&, const Hold& hold, bool all);
  template <typename Made>
  void with_resident(const ModelPtr& model, std::uint32_t layer,
                     const std::function<std::shared_ptr<Made>()>& make,
                     const std::function<void(Made&, const Layer&)>& work);
  bool wait_until(Lock& lock, Deadline deadline, const Poll& poll,
                  const std::function<bool()>& done);
  void await_users(Lock& lock, const Selection& selection, Deadline deadline, const Poll& poll,
                   Patience patience, const std::function<bool()>& leased,
                   const std::function<bool()>& in_use);
  bool streams_in_use(const Lock&) const;
  bool await_streams(Lock& lock, Deadline deadline, const Poll& poll);
  void evict_locked(Lock& lock, const Selection& selection, Deadline deadline, const Poll& poll,
                    Patience patience);
  std::uint64_t trim_locked(Lock& lock);

  DevicePtr device_;
  Arena arena_;
  StagingPool staging_;
  Books books_;
  LeaseDesk desk_;
  Transfer transfer_;
  std::uint64_t next_id_ = 0;
  bool closed_ = false;
  bool closing_ = false;  // by some thread
};

}  // namespace warmserve
