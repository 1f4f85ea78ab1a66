// The links of Uploads, and the choice of a link for each piece.
#include <algorithm>
#include <utility>

#include "load/copy_engine.h"
#include "memory/arena.h"

namespace warmserve {

void Uploads::release() {
  std::vector<LanePtr> routes;  // destroyed without the lock: destroying a route may block
  const std::lock_guard lock(mutex_);
  stream_.reset();
  spare_events_.clear();
  routes.assign(lanes_.begin() + 1, lanes_.end());
  lanes_.resize(1);
}

void Uploads::add(RoutePtr route) {
  const std::lock_guard lock(mutex_);
  for (const LanePtr& lane : lanes_)
    if (lane->route && !lane->dropped && lane->route->name() == route->name())
      throw Error(ErrorKind::invalid_argument, "a route '" + route->name() + "' exists already");
  lanes_.push_back(std::make_shared<Lane>(Lane{std::move(route)}));
}

void Uploads::drop(const std::string& name) {
  LanePtr gone;  // destroyed without the lock: destroying a route may block
  const std::lock_guard lock(mutex_);
  const auto found = std::find_if(lanes_.begin(), lanes_.end(), [&](const LanePtr& lane) {
    return lane->route && !lane->dropped && lane->route->name() == name;
  });
  if (found == lanes_.end())
    throw Error(ErrorKind::invalid_argument, "unknown route '" + name + "'");
  (*found)->dropped = true;
  if (!(*found)->flights.empty()) return;
  gone = *found;
  lanes_.erase(found);
}

std::vector<RouteState> Uploads::routes() {
  std::vector<RouteState> states;
  const std::lock_guard lock(mutex_);
  for (const LanePtr& lane : lanes_)
    if (lane->route && !lane->dropped)
      states.push_back({lane->route->name(), lane->carried, lane->load.bandwidth(), lane->error});
  return states;
}

// Starts a flight on the link that would finish it first; flights that are not urgent use the own
// link only. Returns false if the chosen route is full and the own link is busy, if the flight is
// not urgent and the limit of such flights is reached, or if every link is still busy with its
// first piece, so that no speed is known.
bool Uploads::begin(const FlightPtr& flight) {
  for (;;) {
    Lane& own = *lanes_.front();
    Lane* lane = &own;
    if (flight->urgent && lanes_.size() > 1) lane = soonest(lanes_, flight->bytes, Clock::now());
    if (!lane) return false;
    if (!lane->route) {
      if (!flight->urgent && not_urgent_ && not_urgent_ + flight->bytes > staging_.chunk_bytes())
        return false;
      begin_on_own_link(flight);
      return true;
    }
    try {
      flight->crossing = lane->route->begin(flight->copies);
    } catch (const std::exception& error) {
      lane->error = error.what();
      continue;
    }
    if (!flight->crossing) {
      if (!own.load.idle()) return false;
      begin_on_own_link(flight);
      return true;
    }
    lane->flights.push_back(flight);
    lane->load.sent(flight->bytes, Clock::now());
    return true;
  }
}

// Throws if it enqueued no copy.
void Uploads::begin_on_own_link(const FlightPtr& flight) {
  Lane& own = *lanes_.front();
  if (!stream_) stream_ = std::make_unique<Stream>(arena_.device(), StreamPriority::background);
  if (const auto error = enqueue(*flight))
    news_.push_back({flight->fill, flight->generation, 0, error});
  own.flights.push_back(flight);
  own.load.sent(flight->bytes, Clock::now());
  if (!flight->urgent) not_urgent_ += flight->bytes;
}

// Repeats on the own link the copies that a route failed to carry. The route's error is visible in
// RouteState only; an error of the own link is reported for the fill.
void Uploads::begin_again(const FlightPtr& flight) {
  flight->crossing.reset();
  try {
    begin_on_own_link(flight);
  } catch (...) {
    news_.push_back({flight->fill, flight->generation, 0, std::current_exception()});
    news_.push_back({flight->fill, flight->generation, flight->bytes, nullptr});
  }
}

}  // namespace warmserve
