#include "bind/handles.h"

#include <cmath>

#include "bind/dlpack.h"
#include "checkpoint/layout.h"

namespace py = pybind11;

namespace warmserve {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

std::shared_ptr<Stream> stream_of(const PyStream* stream) {
  return stream ? stream->stream : nullptr;
}

dlpack::View bytes_at(const PyModel& self, const ReservationPtr& reservation, std::uint32_t layer,
                      std::uint64_t offset, std::uint64_t bytes) {
  const Layer& at = self.model->layers.at(layer);
  if (offset > at.bytes || bytes > at.bytes - offset)
    throw Error(ErrorKind::invalid_argument, "a view must lie inside its layer");
  dlpack::View view;
  view.reservation = reservation;
  view.address = reservation->address() + at.offset + offset;
  view.bytes = bytes;
  view.read_only = !self.model->writable;
  return view;
}

dlpack::View view(const PyModel& self, std::uint32_t layer, std::uint64_t offset,
                  std::vector<std::int64_t> shape, std::uint64_t bytes, std::uint8_t code,
                  std::uint8_t bits, std::uint16_t lanes) {
  dlpack::View made = bytes_at(self, reservation_of(self), layer, offset, bytes);
  made.dtype = {code, bits, lanes};
  made.shape = std::move(shape);
  return made;
}

dlpack::View tensor(const PyModel& self, std::uint32_t layer, std::uint64_t offset,
                    std::vector<std::int64_t> shape, std::uint64_t bytes, std::uint8_t type,
                    bool as_bytes) {
  if (type >= element_types().size())
    throw Error(ErrorKind::invalid_argument, "unknown element type");
  dlpack::View made = bytes_at(self, reservation_of(self), layer, offset, bytes);
  made.set_elements(type, std::move(shape), as_bytes);
  return made;
}

// Returns the names and the capsules of the layer's tensors [first, last). One call makes them all,
// because thousands of views, each made by its own call from Python, would take as long as a load.
// Two lists are returned, because Python's garbage collector would have to scan a tuple per tensor.
std::pair<py::list, py::list> capsules(const PyModel& self, const Layout& layout,
                                       std::uint32_t layer, std::size_t first, std::size_t last) {
  if (layer >= layout.bytes.size()) throw py::index_error("layer index out of range");
  const ReservationPtr reservation = reservation_of(self);
  const auto members = layout.members_of(layer);
  const py::none none;
  py::list names, capsules;
  for (std::size_t i = first; i < std::min(last, members.size()); ++i) {
    const std::uint32_t number = members[i];
    const Layout::Place& place = layout.places[number];
    const auto shape = layout.table->shape(layout.table->tensors[number]);
    const std::string_view name = layout.table->names[number];
    dlpack::View made = bytes_at(self, reservation, layer, place.offset, place.bytes);
    made.set_elements(layout.types[number], {shape.begin(), shape.end()}, false);
    names.append(py::str(name.data(), name.size()));
    capsules.append(made.export_capsule(none, none, none, none));
  }
  return {names, capsules};
}

}  // namespace

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

Poll polling(const py::object& call) {
  if (call.is_none()) return check_signals;
  return [&call] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    call();
  };
}

Deadline deadline(std::optional<double> seconds) {
  if (!seconds) return kNever;
  if (std::isnan(*seconds)) throw Error(ErrorKind::invalid_argument, "timeout must not be nan");
  if (*seconds > 1e9) return kNever;
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                            std::chrono::duration<double>(std::max(*seconds, 0.0)));
}

ReservationPtr reservation_of(const PyModel& model) {
  if (model.model->reserved.load(std::memory_order_acquire))
    return model.runtime->reservation(model.model);
  const py::gil_scoped_release release;
  return model.runtime->reservation(model.model);
}

Selection select(const PyModel& model, const Layers& layers) {
  if (!layers) return model.model;
  LayerSet set;
  for (const std::uint32_t index : *layers) {
    if (index >= model.model->layers.size())
      throw Error(ErrorKind::invalid_argument,
                  "'" + model.model->name + "' has no layer " + std::to_string(index));
    set.insert(index);
  }
  return {model.model, std::move(set)};
}

void bind_handles(py::module_& m) {
  py::class_<dlpack::View>(m, "View")
      .def("__dlpack__", &dlpack::View::export_capsule, py::kw_only(),
           py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__",
           [](const dlpack::View& self) {
             const dlpack::Device device = self.device();
             return std::pair(static_cast<int>(device.type), device.id);
           })
      .def_property_readonly("__cuda_array_interface__", &dlpack::View::cuda_array_interface)
      .def_readonly("address", &dlpack::View::address)
      .def_readonly("nbytes", &dlpack::View::bytes);
  py::class_<PyModel>(m, "Model")
      .def_property_readonly("name", [](const PyModel& self) { return self.model->name; })
      .def_property_readonly("backing_epoch",
                             [](const PyModel& self) {
                               return self.model->backing_epoch.load(std::memory_order_acquire);
                             })
      .def_property_readonly("leased",
                             [](const PyModel& self) { return self.runtime->leased(self.model); })
      .def(
          "wait",
          [](const PyModel& self, std::uint32_t layer, const PyStream* stream,
             std::optional<double> timeout) {
            const auto behind = stream_of(stream);
            const py::gil_scoped_release release;
            return self.runtime->await_layer(nullptr, self.model, layer, behind, deadline(timeout),
                                             check_signals);
          },
          py::arg("layer"), py::arg("stream") = py::none(), py::arg("timeout") = py::none())
      .def(
          "record",
          [](const PyModel& self, const PyStream& stream) {
            const auto recorded = stream.stream;
            const py::gil_scoped_release release;
            self.runtime->record(self.model, recorded);
          },
          py::arg("stream"))
      .def("begin_pass",
           [](const PyModel& self) -> std::optional<PyPass> {
             Runtime::Pass pass = self.runtime->begin_pass(self.model);
             if (!pass.lease) return std::nullopt;
             return PyPass{PyLease(self.runtime, std::move(pass.lease)), self.model, pass.complete,
                           pass.lease_epoch};
           })
      .def("view", &view, py::arg("layer"), py::arg("offset"), py::arg("shape"), py::arg("nbytes"),
           py::arg("code"), py::arg("bits"), py::arg("lanes"))
      .def("tensor", &tensor, py::arg("layer"), py::arg("offset"), py::arg("shape"),
           py::arg("nbytes"), py::arg("type"), py::arg("as_bytes"))
      .def("capsules", &capsules, py::arg("layout"), py::arg("layer"), py::arg("first"),
           py::arg("last"));
  py::class_<Waker, std::shared_ptr<Waker>>(m, "Waker")
      .def(py::init<>())
      .def("fileno", &Waker::fileno)
      .def("take", &Waker::take);
  py::class_<PyTicket>(m, "Ticket")
      .def(
          "wait",
          [](const PyTicket& self, std::optional<double> timeout,
             std::optional<std::uint32_t> layer) {
            const Deadline until = deadline(timeout);
            if (layer)
              self.runtime->wait(self.ticket, self.model, *layer, until, check_signals);
            else
              self.runtime->wait(self.ticket, until, check_signals);
          },
          py::arg("timeout") = py::none(), py::kw_only(), py::arg("layer") = py::none(), NoGil())
      .def("cancel", [](const PyTicket& self) { self.runtime->cancel(self.ticket); })
      .def("fileno", [](const PyTicket& self) { return self.runtime->fileno(self.ticket); })
      .def(
          "notify",
          [](const PyTicket& self, const std::shared_ptr<Waker>& waker, std::uint64_t token) {
            return self.runtime->notify(self.ticket, waker, token);
          },
          py::arg("waker"), py::arg("token"))
      .def_property_readonly("done",
                             [](const PyTicket& self) { return self.runtime->done(self.ticket); })
      .def_property_readonly("what", [](const PyTicket& self) { return self.ticket->what; })
      .def_property_readonly(
          "progress", [](const PyTicket& self) { return self.runtime->progress(self.ticket); })
      .def_property_readonly("layers_left", [](const PyTicket& self) {
        return self.runtime->layers_left(self.ticket);
      });
  py::class_<PyLease>(m, "Lease")
      .def(
          "wait",
          [](const PyLease& self, std::optional<double> timeout, bool all) {
            const LeasePtr lease = self.held();  // another thread may release it meanwhile
            const py::gil_scoped_release release;
            self.runtime->await_lease(lease, deadline(timeout), check_signals, all);
            return lease->entry || lease->ticket;
          },
          py::arg("timeout") = py::none(), py::arg("all") = true)
      .def(
          "ready",
          [](const PyLease& self, bool all) { return self.runtime->ready(self.held(), all); },
          py::arg("all") = true)
      .def(
          "notify",
          [](const PyLease& self, const std::shared_ptr<Waker>& waker, std::uint64_t token,
             bool all) { return self.runtime->notify(self.held(), all, waker, token); },
          py::arg("waker"), py::arg("token"), py::arg("all") = true)
      .def(
          "wait_layer",
          [](const PyLease& self, const PyModel& model, std::uint32_t layer, const PyStream* stream,
             std::optional<double> timeout) {
            const LeasePtr lease = self.held();
            const auto behind = stream_of(stream);
            const py::gil_scoped_release release;
            self.runtime->await_layer(lease, model.model, layer, behind, deadline(timeout),
                                      check_signals);
          },
          py::arg("model"), py::arg("layer"), py::arg("stream") = py::none(),
          py::arg("timeout") = py::none())
      .def(
          "arrived",
          [](const PyLease& self, const PyModel& model, std::uint32_t layer) {
            return self.lease && self.runtime->arrived(self.lease, model.model, layer);
          },
          py::arg("model"), py::arg("layer"))
      .def(
          "share",
          [](const PyLease& self, std::uint64_t owner) {
            return PyLease(self.runtime, self.runtime->share_lease(self.held(), owner));
          },
          py::arg("owner"))
      .def(
          "record",
          [](const PyLease& self, const PyStream& stream) {
            const LeasePtr lease = self.held();
            const auto recorded = stream.stream;
            const py::gil_scoped_release release;
            self.runtime->record(lease, recorded);
          },
          py::arg("stream"))
      .def("release", &PyLease::release);
  // The first lines of acquire() run with the GIL, because giving it up takes longer than they do.
  const auto acquire = [](PyGuard& self) {
    if (self.guard->try_acquire()) return;
    const py::gil_scoped_release release;
    self.guard->acquire(deadline(self.timeout), check_signals);
  };
  py::class_<PyGuard>(m, "Guard")
      .def("acquire", acquire)
      .def("release", [](PyGuard& self) { self.guard->release(); })
      .def("__enter__",
           [acquire](py::object self) {
             acquire(self.cast<PyGuard&>());
             return self;
           })
      .def("__exit__", [](PyGuard& self, const py::handle&, const py::handle&,
                          const py::handle&) { self.guard->release(); })
      .def_property_readonly("holds", [](const PyGuard& self) { return self.guard->holds(); });
  py::class_<PyPass>(m, "Pass")
      .def_readonly("complete", &PyPass::complete)
      .def_readonly("lease_epoch", &PyPass::lease_epoch)
      .def(
          "wait",
          [](const PyPass& self, std::uint32_t layer, const PyStream* stream,
             std::optional<double> timeout) {
            const LeasePtr lease = self.lease.held();
            const auto behind = stream_of(stream);
            const py::gil_scoped_release release;
            return self.lease.runtime->await_layer(lease, self.model, layer, behind,
                                                   deadline(timeout), check_signals);
          },
          py::arg("layer"), py::arg("stream") = py::none(), py::arg("timeout") = py::none())
      .def(
          "record",
          [](const PyPass& self, const PyStream& stream) {
            const LeasePtr lease = self.lease.held();
            const auto recorded = stream.stream;
            const py::gil_scoped_release release;
            self.lease.runtime->record(lease, recorded);
          },
          py::arg("stream"))
      .def("release", [](PyPass& self) { self.lease.release(); });
  py::class_<PyStream>(m, "Stream")
      .def_property_readonly(
          "handle",
          [](const PyStream& self) { return static_cast<std::uint64_t>(self.stream->id()); })
      .def(
          "copy_from",
          [](const PyStream& self, const py::buffer& out, const dlpack::View& from) {
            const py::buffer_info info = out.request(true);
            if (static_cast<std::uint64_t>(info.size * info.itemsize) < from.bytes)
              throw Error(ErrorKind::invalid_argument, "the buffer is smaller than the view");
            const py::gil_scoped_release release;  // a copy to pageable memory waits for the stream
            self.stream->copy_from_device(static_cast<std::byte*>(info.ptr), from.address,
                                          from.bytes);
          },
          py::arg("out"), py::arg("view"))
      .def(
          "refuse_capture", [](const PyStream& self) { self.stream->refuse_capture(); }, NoGil())
      .def(
          "step", [](const PyStream& self) { return self.stream->step(); }, NoGil())
      .def("synchronize", [](const PyStream& self) { self.stream->synchronize(); }, NoGil());
}

}  // namespace warmserve
