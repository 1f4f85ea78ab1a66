// Routes: ways from pinned host memory to the device's memory beside the device's own link.
//
// The own link needs no Route and always exists. An embedder of the runtime adds routes. The only
// implementation in this library uses a peer's link (peer_route.h).
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "base/types.h"

namespace warmserve {

// Host bytes and their destination on the device. Routes never get a copy without `from`.
struct Copy {
  Address to;
  const std::byte* from;  // null: zeros, which the device's own stream writes
  std::uint64_t bytes;

  // Returns whether the copy ends where a copy of these addresses would begin.
  bool ends_at(Address next_to, const std::byte* next_from) const {
    return to + bytes == next_to && (from ? from + bytes == next_from : !next_from);
  }
};

// Copies on a route that were started together. Thread-safe.
class RouteCopy {
 public:
  enum class State {
    moving,   // source and destination belong to the copies
    arrived,  // all bytes have arrived; work enqueued on the device from now on sees them
    failed,  // the destination is undefined; as in `arrived`, the copies touch neither end any more
  };
  virtual ~RouteCopy() = default;  // precondition: arrived or failed
  // Returns the state. Blocks while it is `moving`, until `until` at the latest. Sets `why` if it
  // returns `failed`.
  virtual State poll(Deadline until, std::string* why) noexcept = 0;
};

class Route {
 public:
  virtual ~Route() = default;  // precondition: all its copies are destroyed
  virtual const std::string& name() const noexcept = 0;
  // Starts these copies, at most a staging chunk's bytes. Returns null if the route has no room
  // now. If it throws it must have started no copy, and it is not called again. The runtime makes
  // one call at a time. Must not block and must not call back into the runtime.
  virtual std::shared_ptr<RouteCopy> begin(std::span<const Copy> copies) = 0;
};
using RoutePtr = std::shared_ptr<Route>;

struct RouteState {
  std::string name;
  std::uint64_t bytes = 0;  // carried so far
  double bandwidth = 0;     // bytes per second, as measured last; 0: not measured yet
  std::string error;        // why the route accepts no more copies; empty: it does
};

}  // namespace warmserve
