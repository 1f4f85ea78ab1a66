#include "load/ticket.h"

#include <algorithm>

namespace warmserve {

bool wants_layer(const std::vector<Selection>& wants, const Layer& layer) noexcept {
  return std::any_of(wants.begin(), wants.end(), [&](const Selection& wanted) {
    return wanted.model.get() == layer.model && wanted.layers.contains(layer.index);
  });
}

void Ticket::finish(SharedState& state, const Lock&, std::exception_ptr why) {
  if (done) return;
  done = true;
  error = why;
  eventfd_.signal();
  for (const auto& [listener, token] : std::exchange(listeners_, {}))
    if (const auto waker = listener.lock()) waker->wake(token);
  state.wake();
}

int Ticket::fileno(const Lock&) {
  const bool asked_before = eventfd_.made();
  const int descriptor = eventfd_.descriptor();
  if (done && !asked_before) eventfd_.signal();
  return descriptor;
}

bool Ticket::notify(const Lock&, const std::shared_ptr<Waker>& waker, std::uint64_t token) {
  if (done) return false;
  std::erase_if(listeners_, [](const auto& each) { return each.first.expired(); });
  listeners_.emplace_back(waker, token);
  return true;
}

}  // namespace warmserve
