// Staged copies: bytes are read into a staging chunk and copied to a granule on a stream.
//
// Used if the CPU cannot write granules. Copies use the device's own host link. Urgent copies
// (those of foreground loads) may also use routes; each chunk takes the link that would finish it
// first. If a route fails, its copies are repeated on the own link, from the same chunk.
//
// Several loader threads may send at once. take_completions() returns the outcomes of all sends, on
// any thread. Enqueued copies cannot be cancelled. Copies that are not urgent are therefore limited
// to one chunk's bytes in flight, so an urgent copy or a cancellation waits for at most one chunk.
// Urgent copies on the own link are limited to the bytes of the staging memory, even if they read
// the host cache.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "load/links.h"
#include "memory/staging.h"
#include "model/host_cache.h"
#include "model/model.h"

namespace warmserve {

class Arena;

// A piece whose copies are in flight on a link, or zeros that the device writes. No link carries
// the zeros; they are enqueued with the own link's copies.
struct InFlightCopy {
  LayerLoad* load;
  unsigned generation;
  std::uint64_t bytes;
  bool urgent;
  std::shared_ptr<const void> memory;  // a chunk or an image, which the copies read; null: zeros
  std::vector<Copy> copies;
  std::shared_ptr<Event> event{};           // null if recording failed: then synchronize the stream
  std::shared_ptr<RouteCopy> route_copy{};  // set on a route, which has no event

  bool zeros() const noexcept { return !memory; }
};

class CopyEngine {
 public:
  // Outcome of a send. An error is reported once, immediately; a second record follows when the
  // copies are over and the granules may be reused.
  struct Completion {
    LayerLoad* load;
    unsigned generation;  // of the load at the time of the send
    std::uint64_t bytes;
    std::exception_ptr error;  // null: the copies are over
  };
  using Events = std::vector<std::shared_ptr<Event>>;
  struct CopyOptions {
    unsigned generation;
    bool urgent;
    Deadline not_before;                  // earliest time of the copies
    const std::function<bool()>& wanted;  // called before each piece, without a lock
    std::span<std::uint64_t> sums;        // see add_to_digests
    HostImagePtr image;                   // read the files into this; null: into a staging chunk
    bool cached;                          // the image has the bytes: read no file
  };

  CopyEngine(const Arena& arena, StagingPool& staging, std::chrono::milliseconds staging_timeout)
      : arena_(arena), staging_(staging), staging_timeout_(staging_timeout) {}

  // Adds a route for urgent copies. Throws invalid_argument for a duplicate name.
  void add_route(const RoutePtr& route);
  // Removes a route. It accepts no more copies and is destroyed when its last copy is over. Throws
  // invalid_argument for an unknown name.
  void drop_route(const std::string& name);
  std::vector<RouteState> routes();

  // Sends layer bytes [begin, end), at most a chunk, to the layer's granules. The device writes the
  // zeros behind the layer's last byte. Returns how many bytes it sent; fewer if options.wanted()
  // became false or an error occurred, which take_completions() reports. The granules of the bytes
  // sent may be reused once take_completions() has reported that their copies are over. Throws if
  // an error occurred before the first piece. Blocks for a staging chunk, the file, and copies in
  // flight.
  std::uint64_t send(LayerLoad* load, const Model& model, const Layer& layer, std::uint64_t begin,
                     std::uint64_t end, const CopyOptions& options);
  // Finds the copies that are over. With `wait`, and if there is no outcome yet, blocks up to a
  // poll interval for the oldest copies, and returns whether copies are still in progress.
  bool find_completions(bool wait);
  // Returns the outcomes since the last call, in their order. Called under the runtime's lock, so
  // that they are also accounted for in this order: a load may end with its last one.
  std::vector<Completion> take_completions();
  // Returns whether copies are in flight or outcomes were not taken yet.
  bool under_way();
  // Returns the events that a stream must wait for before it uses the layer: those of the load's
  // copies in flight. Returns nullopt if one of these copies has no event; copies on routes have
  // none.
  std::optional<Events> events(const LayerLoad* load);
  // Releases the stream, the events and the routes. Precondition: no copies are in flight, and no
  // more will be sent.
  void release();

 private:
  enum class Copies { over, moving, stuck, failed };

  // Host memory that has bytes of a layer.
  struct HostBytes {
    std::shared_ptr<const void> owner;
    Destination memory;
    std::span<const std::uint32_t> slabs{};  // of the blocks of an image
    // Returns whether the block at a layer offset continues the pinned region of the one before.
    bool continues(std::uint64_t offset) const {
      const std::uint64_t block = (offset - memory.layer_offset) / memory.block_bytes;
      return slabs.empty() || block == 0 || slabs[block] == slabs[block - 1];
    }
  };
  StagingPool::Chunk chunk();
  HostBytes bytes_of(const Model& model, const Layer& layer, std::uint64_t begin, std::uint64_t end,
                     const CopyOptions& options);
  std::vector<Copy> copies_of(const Layer& layer, std::uint64_t begin, std::uint64_t bytes,
                              const HostBytes* from) const;
  bool send_piece(const InFlightCopyPtr& pending, Deadline deadline, const CopyOptions& options);
  bool begin(const InFlightCopyPtr& pending);
  void begin_on_own_link(const InFlightCopyPtr& pending);
  void begin_again(const InFlightCopyPtr& pending);
  std::exception_ptr enqueue(InFlightCopy& pending);
  std::shared_ptr<Event> spare_event();
  struct Reaped {
    bool completed = false;  // some copies are over
    bool moving = false;     // others will complete without further calls
  };
  using Wait = std::chrono::microseconds;  // 0: do not wait
  Reaped reap(bool wait);
  Reaped reap_link(std::unique_lock<std::mutex>& lock, Link& link, Wait wait);
  static Copies poll_route(RouteCopy& route_copy, Wait wait, std::string* why);
  Copies poll_event(const Event* event, Wait wait, std::exception_ptr& error);

  const Arena& arena_;
  StagingPool& staging_;
  const std::chrono::milliseconds staging_timeout_;

  std::mutex mutex_;  // guards all members below; held while enqueueing, which does not block
  std::unique_ptr<Stream> stream_;
  std::vector<std::shared_ptr<Event>> spare_events_;
  Links links_;
  std::uint64_t not_urgent_ = 0;  // bytes in flight that are not urgent, all on the own link
  std::vector<Completion> completions_;
};

}  // namespace warmserve
