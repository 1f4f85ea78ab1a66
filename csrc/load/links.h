// The links to a device: its own host link and its routes. Which of them takes a piece, which
// copies are in flight on each, and how fast each is.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "load/link_traffic.h"
#include "load/route.h"

namespace warmserve {

struct InFlightCopy;  // see copy_engine.h
using InFlightCopyPtr = std::shared_ptr<InFlightCopy>;

struct Link {
  RoutePtr route;                           // null: the device's own link
  std::deque<InFlightCopyPtr> in_flight{};  // in the order of their sends
  LinkTraffic traffic{};
  std::uint64_t carried = 0;
  std::string error{};   // why the route accepts no more copies; empty: it does
  bool dropped = false;  // removed when its last copy is over

  bool takes() const { return !dropped && error.empty(); }
};
using LinkPtr = std::shared_ptr<Link>;

// Used under the owner's lock, which need not be held while a returned link is destroyed.
class Links {
 public:
  Link& own() const { return *links_.front(); }
  const std::vector<LinkPtr>& all() const { return links_; }  // the first is the own link
  bool busy() const;                                          // copies are in flight on some link
  std::vector<RouteState> routes() const;

  // Returns the link that would finish a piece first; pieces that are not urgent take the own link
  // only. Returns null if every link is still busy with its first piece, so that no speed is known.
  Link* choose(std::uint64_t bytes, bool urgent, Deadline now) const;

  // Adds a route. Throws invalid_argument for a duplicate name.
  void add(const RoutePtr& route);
  // Ends a route: it gets no more copies. Returns it if no copy is in flight on it, else null;
  // remove_ended() then removes it later. Destroy it without the lock, because that may block.
  // Throws invalid_argument for an unknown name.
  LinkPtr drop(const std::string& name);
  // Removes the dropped routes whose last copy is over. Precondition: the caller keeps them, and
  // destroys them without the lock.
  void remove_ended();
  // Removes all routes and returns them, to be destroyed without the lock.
  std::vector<LinkPtr> remove_routes();

 private:
  std::vector<LinkPtr> links_{std::make_shared<Link>()};
};

}  // namespace warmserve
