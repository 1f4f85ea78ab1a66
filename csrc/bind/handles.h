// Python's handles of a runtime's models, tickets, leases, passes and streams. Handles of models,
// tickets, leases and passes keep the runtime alive; a stream keeps its device alive.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "runtime/guard.h"
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
  ModelPtr model;  // the model that the ticket loads
};
struct PyLease {
  RuntimePtr runtime;
  LeasePtr lease;
  PyLease(RuntimePtr r, LeasePtr l) : runtime(std::move(r)), lease(std::move(l)) {}
  PyLease(PyLease&&) = default;
  ~PyLease() { release(); }
  void release() {
    if (lease) runtime->end_lease(std::exchange(lease, nullptr));
  }
  const LeasePtr& held() const {
    if (!lease) throw Error(ErrorKind::stale_view, "the lease was released");
    return lease;
  }
};
struct PyGuard {
  RuntimePtr runtime;
  std::unique_ptr<Guard> guard;
  std::optional<double> timeout;
};
struct PyPass {
  PyLease lease;
  ModelPtr model;
  bool complete;
  std::uint64_t lease_epoch;
};
struct PyStream {
  std::shared_ptr<Stream> stream;
  explicit PyStream(std::shared_ptr<Stream> s) : stream(std::move(s)) {}
  PyStream(PyStream&&) = default;
  // Without the GIL: dropping the last reference to a stream of ours waits for the stream's work,
  // which may need the GIL.
  ~PyStream() {
    if (!stream || stream->adopted()) return;
    const pybind11::gil_scoped_release release;
    stream.reset();
  }
};
using Layers = std::optional<std::vector<std::uint32_t>>;  // nullopt: all layers

// Returns the model's reservation. Without the GIL if the driver has still to make it.
ReservationPtr reservation_of(const PyModel& model);
Selection select(const PyModel& model, const Layers& layers);
// Converts a timeout in seconds to a deadline; nullopt: never.
Deadline deadline(std::optional<double> seconds);
// Throws if a signal such as Ctrl-C has arrived. Precondition: the caller does not hold the GIL.
void check_signals();
// Returns a poll that checks signals and then calls `call`, unless it is None. An exception of
// `call` ends the wait. `call` must outlive the poll.
Poll polling(const pybind11::object& call);

void bind_handles(pybind11::module_& m);

}  // namespace warmserve
