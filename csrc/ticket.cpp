#include "ticket.h"

#include <algorithm>

namespace warmserve {

bool wants_layer(const std::vector<Selection>& wants, const Layer& layer) noexcept {
  return std::any_of(wants.begin(), wants.end(), [&](const Selection& wanted) {
    return wanted.model.get() == layer.model && wanted.layers.contains(layer.index);
  });
}

void Ticket::finish(Books& books, const Lock&, std::exception_ptr why) {
  if (done) return;
  done = true;
  error = why;
  eventfd_.signal();
  books.wake();
}

int Ticket::fileno(const Lock&) {
  const bool asked_before = eventfd_.made();
  const int descriptor = eventfd_.descriptor();
  if (done && !asked_before) eventfd_.signal();
  return descriptor;
}

}  // namespace warmserve
