// The links of CopyEngine, and the choice of a link for each piece.
#include <algorithm>
#include <utility>

#include "load/copy_engine.h"
#include "memory/arena.h"

namespace warmserve {

void CopyEngine::release() {
  std::vector<LinkPtr> routes;  // destroyed without the lock: destroying a route may block
  const std::lock_guard lock(mutex_);
  stream_.reset();
  spare_events_.clear();
  routes.assign(links_.begin() + 1, links_.end());
  links_.resize(1);
}

void CopyEngine::add(RoutePtr route) {
  const std::lock_guard lock(mutex_);
  for (const LinkPtr& link : links_)
    if (link->route && !link->dropped && link->route->name() == route->name())
      throw Error(ErrorKind::invalid_argument, "a route '" + route->name() + "' exists already");
  links_.push_back(std::make_shared<Link>(Link{std::move(route)}));
}

void CopyEngine::drop(const std::string& name) {
  LinkPtr gone;  // destroyed without the lock: destroying a route may block
  const std::lock_guard lock(mutex_);
  const auto found = std::find_if(links_.begin(), links_.end(), [&](const LinkPtr& link) {
    return link->route && !link->dropped && link->route->name() == name;
  });
  if (found == links_.end())
    throw Error(ErrorKind::invalid_argument, "unknown route '" + name + "'");
  (*found)->dropped = true;
  if (!(*found)->in_flight.empty()) return;
  gone = *found;
  links_.erase(found);
}

std::vector<RouteState> CopyEngine::routes() {
  std::vector<RouteState> states;
  const std::lock_guard lock(mutex_);
  for (const LinkPtr& link : links_)
    if (link->route && !link->dropped)
      states.push_back(
          {link->route->name(), link->carried, link->traffic.bandwidth(), link->error});
  return states;
}

// Starts the copies of a piece on the link that would finish them first; copies that are not urgent
// use the own link only. Returns false if the chosen route is full and the own link is busy, if the
// copies are not urgent and the limit of such copies is reached, or if every link is still busy
// with its first piece, so that no speed is known.
bool CopyEngine::begin(const InFlightCopyPtr& pending) {
  for (;;) {
    Link& own = *links_.front();
    Link* link = &own;
    if (pending->urgent && links_.size() > 1)
      link = earliest_finish(links_, pending->bytes, Clock::now());
    if (!link) return false;
    if (!link->route) {
      if (!pending->urgent && not_urgent_ && not_urgent_ + pending->bytes > staging_.chunk_bytes())
        return false;
      begin_on_own_link(pending);
      return true;
    }
    try {
      pending->route_copy = link->route->begin(pending->copies);
    } catch (const std::exception& error) {
      link->error = error.what();
      continue;
    }
    if (!pending->route_copy) {
      if (!own.traffic.idle()) return false;
      begin_on_own_link(pending);
      return true;
    }
    link->in_flight.push_back(pending);
    link->traffic.sent(pending->bytes, Clock::now());
    return true;
  }
}

// Throws if it enqueued no copy.
void CopyEngine::begin_on_own_link(const InFlightCopyPtr& pending) {
  Link& own = *links_.front();
  if (!stream_) stream_ = std::make_unique<Stream>(arena_.device(), StreamPriority::background);
  if (const auto error = enqueue(*pending))
    completions_.push_back({pending->load, pending->generation, 0, error});
  own.in_flight.push_back(pending);
  own.traffic.sent(pending->bytes, Clock::now());
  if (!pending->urgent) not_urgent_ += pending->bytes;
}

// Repeats on the own link the copies that a route failed to carry. The route's error is visible in
// RouteState only; an error of the own link is reported for the load.
void CopyEngine::begin_again(const InFlightCopyPtr& pending) {
  pending->route_copy.reset();
  try {
    begin_on_own_link(pending);
  } catch (...) {
    completions_.push_back({pending->load, pending->generation, 0, std::current_exception()});
    completions_.push_back({pending->load, pending->generation, pending->bytes, nullptr});
  }
}

}  // namespace warmserve
