// The runtime of one device. bind/ exposes this class to Python; a C++ user needs nothing else.
//
// Any thread may call any operation. Each operation states its guarantee:
//   strong     after an exception nothing has changed;
//   per layer  after an exception every layer has a defined residency, and a repeated call
//              continues from there;
//   wait-free  never blocks: takes only the runtime's lock, which is never held over a call that
//              may block.
// In a process forked from the one that made the runtime, operations throw general. Once the device
// is lost, all operations throw device_lost, except those that only read state or release
// something. Operations marked "Blocks" call `poll` about every 20 ms while they wait.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "load/loader.h"
#include "memory/host_slabs.h"
#include "model/host_cache.h"
#include "model/layer_shape.h"
#include "runtime/attachment.h"
#include "runtime/lease_queue.h"

namespace warmserve {

class Guard;

struct RuntimeOptions {
  std::uint64_t arena_bytes = 0, staging_bytes = 0;
  std::uint64_t host_cache_bytes = 0;  // unused if the CPU writes the device's memory itself
  std::uint64_t granule_bytes = 2 * kMiB, chunk_bytes = 8 * kMiB;
  std::uint64_t headroom_bytes = 0;  // device memory left to other users of the device
  unsigned loaders = 1;              // threads; 0: pump
  std::chrono::milliseconds staging_timeout{30'000};  // a load's longest wait for a staging chunk
  bool poison = false;  // evicted addresses stay readable and read as NaN
  // Debugging aid: an eviction waits for all work of the device before it unmaps, so that work that
  // was not recorded does not kill the CUDA context.
  bool fence_device = false;
  double background_share = 0.05;    // share of the bytes moved while foreground loads wait; [0, 1]
  std::uint64_t read_bandwidth = 0;  // upper limit for all loads, in bytes per second; 0: no limit
  // The runtime is a client: its layers come from this broker's arena, of this size and these
  // granules. With loaders = 0 it has no thread.
  std::shared_ptr<BrokerConnection> broker{};
};

// Which users of its layers an eviction waits for: held leases, and streams and passes that still
// use the layers after their leases have ended. For all other users it throws busy.
enum class WaitFor { none, streams, leases_and_streams };

struct LayerState {
  Residency residency = Residency::absent;
  std::uint64_t bytes = 0;
  std::uint64_t granules = 0;
  std::uint32_t leases = 0;
  double keep_value = 0;
  bool cached = false;  // in the host cache
};
struct ModelState {
  std::string name;
  std::uint32_t leases = 0;
  std::uint64_t backing_epoch = 0;
  std::vector<LayerState> layers;
};
struct HostCacheState {
  HostSlabs::State slabs;
  HostCache::Counters counters;
  std::size_t layers = 0;  // in the cache
};
struct RuntimeState {
  std::uint64_t granule_bytes = 0, pinned_bytes = 0;
  std::uint64_t headroom_bytes = 0;
  std::uint32_t granules = 0, granules_free = 0, granules_trimmed = 0;
  std::size_t leases = 0, staging_chunks_free = 0;
  Counters counters;
  HostCacheState host_cache;
  std::vector<RouteState> routes;
  std::vector<ModelState> models;
};

class Runtime {
 public:
  // Constructs a runtime with shared ownership. It is leaked instead of destroyed if the device is
  // not usable at that time (in a forked child, and while the process exits).
  static std::shared_ptr<Runtime> make(std::shared_ptr<Driver> driver,
                                       const RuntimeOptions& options);
  // Throws invalid_argument, out_of_device_memory. Blocks while it makes the arena.
  Runtime(DevicePtr device, const RuntimeOptions& options);
  ~Runtime();  // best-effort close(); errors are swallowed
  Runtime(const Runtime&) = delete;

  const DevicePtr& device() const noexcept { return device_; }

  // Registers a model. Throws as check_layout(), and invalid_argument for invalid checks or a
  // duplicate name. Blocks if it has to read the files to compute digests. Strong.
  ModelPtr register_model(const std::string& name, std::vector<File> files,
                          const std::vector<LayerShape>& layers, bool writable,
                          const Poll& poll = nullptr);
  // Evicts a model and replaces its files by files whose layers have the same sizes; the addresses
  // stay. The files are unchanged until the eviction is complete. Throws busy while the model is
  // leased, timeout, invalid_argument. Blocks.
  void reload(const ModelPtr& model, std::vector<File> files, const std::vector<LayerShape>& layers,
              Deadline deadline, const Poll& poll);
  // Evicts a model and removes it. Its addresses stay reserved while views exist. Throws busy for
  // users that `wait_for` does not cover, and timeout. Per layer. Blocks.
  void unregister(const ModelPtr& model, Deadline deadline, const Poll& poll,
                  WaitFor wait_for = WaitFor::streams);

  // Queues a load of the selected layers. The ticket reports its outcome, layer by layer. Throws
  // out_of_device_memory if the layers exceed the budget, busy if they do not fit beside the leased
  // layers, invalid_argument for unknown layers, an empty selection or a deadline in the past.
  // With `evict_below`, only layers of a lower keep value are evicted for the load; throws busy if
  // they do not make enough room for all its layers, beside those that are being loaded.
  // Strong, wait-free.
  TicketPtr prewarm(const Selection& selection, int priority, Deadline deadline = kNever,
                    double evict_below = kNoLimit);
  // Queues a load of the selected layers to the host cache. Images of lower or equal keep value are
  // evicted for it. The ticket ends with busy if there are too few. Throws invalid_argument if the
  // runtime has no host cache, or if the layers exceed its budget. Strong, wait-free.
  TicketPtr prewarm_host(const Selection& selection, int priority, Deadline deadline = kNever);
  // As prewarm() of `load`, but room for it is made by evicting `evict` before other models.
  // `evict` is absent when the ticket is done. Throws busy while a lease or a pass holds a layer of
  // `evict`. Strong, wait-free.
  TicketPtr swap(const ModelPtr& evict, const ModelPtr& load, int priority);
  // Evicts the selected layers and cancels their loads. Tickets that also want other layers
  // continue with those. Throws busy for users that `wait_for` does not cover, busy if the calling
  // thread would wait for a pass of its own, and timeout. Per layer. Blocks.
  void evict(const Selection& selection, Deadline deadline, const Poll& poll,
             WaitFor wait_for = WaitFor::streams);
  // Releases free granules to the driver and returns their bytes. On a throw the granules released
  // before it stay released. Blocks.
  std::uint64_t trim();
  // Sets the keep value of all layers of the model, or of one. Wait-free.
  void set_keep_value(const ModelPtr& model, double value);
  void set_keep_value(const ModelPtr& model, std::uint32_t layer, double value);
  // Sets the keep values of all layers at once. Throws invalid_argument, and changes nothing, if
  // there is not one value for each layer. Wait-free.
  void set_keep_values(const ModelPtr& model, const std::vector<double>& values);

  // Begins a lease. It is admitted once lease->entry is null or done without error. It has all its
  // layers once lease->ticket, set on admission at the latest, is null or done without error.
  // Throws out_of_device_memory, invalid_argument, and busy for leases that would wait for each
  // other; then no lease has begun. Wait-free.
  LeasePtr begin_lease(std::vector<Selection> wants, std::uint64_t owner);
  // Begins a second lease on the layers of an admitted lease. It is admitted at once, ahead of the
  // leases that wait. Throws stale_view unless the first lease is held. Wait-free.
  LeasePtr share_lease(const LeasePtr& lease, std::uint64_t owner);
  // Blocks until the lease is admitted and, with `all`, has all its layers. On a throw (timeout, a
  // failed load, an exception from poll) the lease is ended.
  void await_lease(const LeasePtr& lease, Deadline deadline, const Poll& poll, bool all = true);
  // The same without blocking. ready() returns true if await_lease() would not wait. notify() wakes
  // the token when the current wait is over; it returns false if await_lease() would not wait.
  // Wait-free.
  bool ready(const LeasePtr& lease, bool all);
  bool notify(const LeasePtr& lease, bool all, const std::shared_ptr<Waker>& waker,
              std::uint64_t token);
  // Waits for a layer. Without a stream, blocks until the layer is resident. With one, blocks until
  // its copies are enqueued and makes the stream wait for them; copies on a route have no event, so
  // then it blocks until the layer is resident. Without a lease, any lease on the layer suffices.
  // Returns true if the layer is resident: while it is held, no further wait for it is needed.
  // Throws stale_view if the layer is not held, invalid_argument if it is not in the lease or the
  // stream is being captured, timeout, and the error of the layer's load.
  bool await_layer(const LeasePtr& lease, const ModelPtr& model, std::uint32_t layer,
                   const std::shared_ptr<Stream>& stream, Deadline deadline, const Poll& poll);
  // Begins a pass of the calling thread on the layers of the model that leases hold now. The pass
  // keeps these layers until it ends, even if the leases end before. A thread may begin its pass
  // again inside the pass; the pass ends with the outermost end_lease(). The lease is null if no
  // layer of the model is leased. `complete`: the pass holds every layer, and all are resident.
  // await_layer() and record() accept a pass like a lease, but throw stale_view for a layer whose
  // lease ended before the layer arrived. Wait-free.
  struct Pass {
    LeasePtr lease;
    bool complete = false;
    std::uint64_t lease_epoch = 0;  // see leased()
  };
  Pass begin_pass(const ModelPtr& model);
  // Returns true if the lease is held and the layer is resident or was waited for with
  // await_layer(). Wait-free.
  bool arrived(const LeasePtr& lease, const ModelPtr& model, std::uint32_t layer);
  // Protects the work enqueued on the stream so far: the lease's layers are unmapped only after it
  // has completed. Throws stale_view unless the lease is held. Throws invalid_argument if the
  // stream is being captured or was destroyed, and the driver's error if it refuses an adopted
  // stream; earlier work of the stream is protected even then. Wait-free, but calls the driver.
  void record(const LeasePtr& lease, const std::shared_ptr<Stream>& stream);
  // As above, for every layer of the model that any lease or pass holds.
  void record(const ModelPtr& model, const std::shared_ptr<Stream>& stream);
  // Ends a lease, also one that still waits for admission or layers, or a pass. Idempotent for a
  // lease. Does nothing in a forked child. Wait-free.
  void end_lease(const LeasePtr& lease);

  bool done(const TicketPtr& ticket);
  // Bytes arrived, bytes in all.
  std::pair<std::uint64_t, std::uint64_t> progress(const TicketPtr& ticket);
  // Layers still to arrive, layers in all.
  std::pair<std::size_t, std::size_t> layers_left(const TicketPtr& ticket);
  // A descriptor, owned by the ticket, that becomes readable when the ticket is done.
  int fileno(const TicketPtr& ticket);
  // Wakes the token when the ticket is done. Returns false if it is done already.
  bool notify(const TicketPtr& ticket, const std::shared_ptr<Waker>& waker, std::uint64_t token);
  // A descriptor, owned by the runtime, that becomes readable when a backing epoch has changed and
  // stays readable until it is read.
  int fileno();
  // Returns whether leases hold every layer and all are resident; and the model's lease epoch, a
  // number that changes whenever a lease on the model begins or ends, or 0 if no lease is on the
  // model. Wait-free.
  std::pair<bool, std::uint64_t> leased(const ModelPtr& model);
  // Blocks until the ticket is done or, with a layer, until that layer is resident. Throws timeout,
  // the ticket's error, or the exception of poll. The load continues after timeout and after an
  // exception of poll.
  void wait(const TicketPtr& ticket, Deadline deadline, const Poll& poll);
  void wait(const TicketPtr& ticket, const ModelPtr& model, std::uint32_t layer, Deadline deadline,
            const Poll& poll);
  // Cancels the ticket's loads. Layers that have arrived stay resident. Wait-free, idempotent.
  void cancel(const TicketPtr& ticket);

  // Returns the model's reservation; makes it on the first call. Strong.
  ReservationPtr reservation(const ModelPtr& model);
  // Copies a resident layer's bytes to `out`. Throws stale_view unless resident. Blocks.
  void read_back(const ModelPtr& model, std::uint32_t layer, std::byte* out);

  // Computes a digest (kernels.h) of each `piece_bytes` bytes of the layer on the device. Throws as
  // read_back(), and general if the device has no kernels. Blocks.
  std::vector<std::uint64_t> digest(const ModelPtr& model, std::uint32_t layer,
                                    std::uint64_t piece_bytes);

  // Adds a route that foreground loads may use beside the device's own link. Throws
  // invalid_argument for a duplicate name, or if the CPU writes the device's memory itself. Strong,
  // wait-free.
  void add_route(const RoutePtr& route);
  // Removes a route, also a failed one. It accepts no more copies and is destroyed when its last
  // copy has completed. Throws invalid_argument for an unknown name.
  void drop_route(const std::string& name);

  // For a broker, which serves this runtime's arena to other processes.

  // Makes each eviction ask the clients first. Returns a descriptor that becomes readable when the
  // state of a layer, a lease or a ticket changes, and stays readable until clear_changes(). Throws
  // busy if a process still maps layers through an earlier broker.
  int serve(std::shared_ptr<Clients> clients);
  void clear_changes();
  // Returns the model of this name; null if none is registered.
  ModelPtr find(const std::string& name);
  struct Granted {
    std::uint32_t layer;
    std::vector<GranuleId> granules;
  };
  // Returns those of the layers that are resident, and their granules. They may be evicted as soon
  // as the caller lets an eviction ask it.
  std::vector<Granted> granted(const Selection& selection);
  // Returns the layers that granules contain, used or not, and these granules; see contents.h.
  std::vector<Granted> recorded(const Selection& selection);
  std::uint64_t arena_id();
  // Makes layers resident whose granules are set aside because a client maps them. It needs no
  // room, and until it is done nothing can evict the layers.
  void adopt(const Selection& selection);
  // Sets free granules aside, and frees those of them that are set aside; see Arena.
  void set_aside(const std::vector<GranuleId>& ids);
  void end_set_aside(const std::vector<GranuleId>& ids);
  // Exports a granule of a layer that cannot be evicted now.
  ExportedGranule exported(GranuleId id) const { return arena_.exported(id); }
  // Returns why the lease or the ticket ended without its layers; null if it did not.
  std::exception_ptr failure(const LeasePtr& lease);
  std::exception_ptr failure(const TicketPtr& ticket);
  // Begins a lease, even if it does not fit, on layers that a client of this number uses.
  LeasePtr hold_for_client(const Selection& selection, std::uint64_t client);
  void end_hold(const LeasePtr& lease);
  // Returns whether leases hold more layers than fit, because of hold_for_client().
  bool overcommitted();

  RuntimeState state();
  bool step();
  void check_invariants();
  // Ends the loader threads, whatever is leased. Afterwards loads make progress only in step() and
  // while a caller waits for them. Idempotent; does nothing in a forked child. Blocks for the
  // threads' present chunks.
  void stop();
  // Ends the loader threads, evicts all models and frees all memory. Throws busy for users that
  // `wait_for` does not cover, and timeout; after both nothing has changed. Throws general if the
  // driver refuses a release; a repeated call continues from there. Per layer. Blocks.
  void close(const Poll& poll, Deadline deadline = kNever, WaitFor wait_for = WaitFor::streams);

 private:
  friend class Guard;
  void enter() const;  // throws in a process other than the one that made the runtime
  Lock lock_open();    // enter(), then locks; throws if closed
  Lock lock_alive();   // lock_open(); throws if the device is lost
  void require_registered(const Lock&, const Model& model) const;
  struct Detached {
    ReservationPtr reservation;
    std::vector<Use> uses;
  };
  Detached detach(const Lock&, Model& model);
  ModelPtr make_model(const std::string& name, std::vector<File> files,
                      const std::vector<LayerShape>& layers, const Poll& poll) const;
  static Layer& layer_of(Model& model, std::uint32_t index);
  void check(const Lock&, const Selection& selection) const;
  void refuse_client(const char* operation) const;
  void end_lease(const Lock& lock, const LeasePtr& lease);
  // Recalls the guards on any of the layers; all guards if `selection` is null.
  void recall_guards(const Lock& lock, const Selection* selection);
  // Gives up layers that the broker wants back. Returns those that leases or passes use.
  LayerSet give_up(const Lock& lock, const Selection& selection);
  void require_room(const Lock&, const Selection& selection, const std::string& what) const;
  void serve(const Lock& lock, const LeasePtr& lease);
  void forget_past_uses(Model& model);
  void await_entry(const LeasePtr& lease, Deadline deadline, const Poll& poll);
  static Ticket* awaited(const Lock&, const Lease& lease, bool all);
  struct Reader;
  void with_resident(const ModelPtr& model, std::uint32_t layer,
                     const std::function<void(Reader&, const Layer&)>& work);
  bool wait_until(Lock& lock, Deadline deadline, const Poll& poll,
                  const std::function<bool()>& done);
  void await_users(Lock& lock, const Selection& selection, Deadline deadline, const Poll& poll,
                   WaitFor wait_for, const std::function<bool()>& leased,
                   const std::function<bool()>& in_use);
  std::vector<FencePtr> all_fences(const Lock&) const;
  bool await_streams(Lock& lock, Deadline deadline, const Poll& poll);
  void evict_locked(Lock& lock, const Selection& selection, Deadline deadline, const Poll& poll,
                    WaitFor wait_for);
  std::uint64_t trim_locked(Lock& lock);

  DevicePtr device_;
  Arena arena_;
  StagingPool staging_;
  HostSlabs host_slabs_;
  SharedState state_;
  const std::unique_ptr<Attachment> attachment_;  // of a client
  HostCache host_cache_;
  LeaseQueue lease_queue_;
  Loader loader_;
  std::uint64_t next_id_ = 0;
  std::vector<Guard*> guards_;  // under the lock
  // Idle readers: as many as calls of read_back() and digest() have run at once. Kept until
  // close().
  std::vector<std::shared_ptr<Reader>> readers_;
  bool closed_ = false;
  bool closing_ = false;  // a thread is inside close()
};

}  // namespace warmserve
