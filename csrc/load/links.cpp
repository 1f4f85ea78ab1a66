#include "load/links.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace warmserve {
namespace {

bool is_route(const Link& link, const std::string& name) {
  return link.route && !link.dropped && link.route->name() == name;
}

}  // namespace

bool Links::busy() const {
  return std::any_of(links_.begin(), links_.end(),
                     [](const LinkPtr& link) { return !link->in_flight.empty(); });
}

std::vector<RouteState> Links::routes() const {
  std::vector<RouteState> states;
  for (const LinkPtr& link : links_)
    if (link->route && !link->dropped)
      states.push_back(
          {link->route->name(), link->carried, link->traffic.bandwidth(), link->error});
  return states;
}

Link* Links::choose(std::uint64_t bytes, bool urgent, Deadline now) const {
  if (urgent && links_.size() > 1) return earliest_finish(links_, bytes, now);
  return &own();
}

void Links::add(const RoutePtr& route) {
  for (const LinkPtr& link : links_)
    if (is_route(*link, route->name()))
      throw Error(ErrorKind::invalid_argument, "a route '" + route->name() + "' exists already");
  links_.push_back(std::make_shared<Link>(Link{route}));
}

LinkPtr Links::drop(const std::string& name) {
  const auto found = std::find_if(links_.begin(), links_.end(),
                                  [&](const LinkPtr& link) { return is_route(*link, name); });
  if (found == links_.end())
    throw Error(ErrorKind::invalid_argument, "unknown route '" + name + "'");
  LinkPtr link = *found;
  link->dropped = true;
  if (!link->in_flight.empty()) return nullptr;
  links_.erase(found);
  return link;
}

void Links::remove_ended() {
  std::erase_if(links_,
                [](const LinkPtr& link) { return link->dropped && link->in_flight.empty(); });
}

std::vector<LinkPtr> Links::remove_routes() {
  std::vector<LinkPtr> routes(links_.begin() + 1, links_.end());
  links_.resize(1);
  return routes;
}

}  // namespace warmserve
