// What Python holds of a runtime: models, tickets, leases, streams. Each keeps the runtime alive.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <vector>

#include "runtime/runtime.h"

namespace warmserve {

using RuntimePtr = std::shared_ptr<Runtime>;

struct PyModel {
  RuntimePtr runtime;
  ModelPtr model;
};
struct PyTicket {
  RuntimePtr runtime;
  TicketPtr ticket;
  ModelPtr model;  // that it loads
};
struct PyHold {
  RuntimePtr runtime;
  HoldPtr hold;
  PyHold(RuntimePtr r, HoldPtr h) : runtime(std::move(r)), hold(std::move(h)) {}
  PyHold(PyHold&&) = default;
  ~PyHold() { release(); }
  void release() {
    if (hold) runtime->end_lease(std::exchange(hold, nullptr));
  }
  const HoldPtr& held() const {
    if (!hold) throw Error(ErrorKind::stale_view, "the lease was released");
    return hold;
  }
};
struct PyPass {
  PyHold held;
  ModelPtr model;
  bool complete;
  std::uint64_t lease_epoch;
};
struct PyStream {
  std::shared_ptr<Stream> stream;
};
using Layers = std::optional<std::vector<std::uint32_t>>;  // none: all

Selection select(const PyModel& model, const Layers& layers);
// Of a timeout in seconds; none: never.
Deadline deadline(std::optional<double> seconds);
// Ctrl-C in a wait. Called without the GIL.
void check_signals();
// The same, and a Python call; what it raises ends the wait. None: signals alone. `call` outlives
// it.
Poll polling(const pybind11::object& call);

void bind_handles(pybind11::module_& m);

}  // namespace warmserve
