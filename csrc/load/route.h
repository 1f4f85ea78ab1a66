// A way by which pinned host memory reaches the device's memory beside the device's own link.
//
// The own link needs no Route and is always there. Whoever embeds the runtime adds others; the one
// that comes with it goes over a neighbour's link (peer_route.h).
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "base/types.h"

namespace warmserve {

// Host bytes, and where on the device they belong.
struct Copy {
  Address to;
  const std::byte* from;
  std::uint64_t bytes;
};

// Copies that were begun together. Several threads may look at once.
class Crossing {
 public:
  enum class State {
    moving,   // both ends belong to the copies
    arrived,  // all bytes are there: work that the device is given from now on sees them
    failed,   // what is there is undefined; as in `arrived`, neither end is touched any more
  };
  virtual ~Crossing() = default;  // arrived or failed
  // Blocks while it is moving, until `until` at the latest. On `failed` says why.
  virtual State look(Deadline until, std::string* why) noexcept = 0;
};

class Route {
 public:
  virtual ~Route() = default;  // all its crossings are gone
  virtual const std::string& name() const noexcept = 0;
  // Begins these copies, a staging chunk's bytes at most. Null: there is no room now. On a throw
  // nothing was begun, and it is not asked again. One call at a time; does not block, and does not
  // call back into the runtime.
  virtual std::shared_ptr<Crossing> begin(std::span<const Copy> copies) = 0;
};
using RoutePtr = std::shared_ptr<Route>;

struct RouteState {
  std::string name;
  std::uint64_t bytes = 0;  // that it has carried
  double bandwidth = 0;     // bytes a second, as measured last; 0: not yet
  std::string error;        // why it carries no more; empty: it does
};

}  // namespace warmserve
