// The extension module warmserve_rt._native. Only the files in bind/ use Python.
//
// Calls that may block release the GIL and check for signals while they wait. The library's own
// threads never run Python; they notify Python through eventfds.
#include <fcntl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <cmath>

#include "base/os_failure.h"
#include "bind/broker.h"
#include "bind/drivers.h"
#include "bind/handles.h"
#include "bind/header.h"
#include "bind/kernels.h"
#include "bind/state.h"
#include "checkpoint/layout.h"
#include "load/peer_route.h"
#include "runtime/runtime.h"

namespace py = pybind11;

namespace warmserve {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

void translate_errors(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const Error& error) {
    static constexpr const char* kNames[] = {
#define X(kind, python) #python,
        WARMSERVE_ERROR_KINDS(X)
#undef X
    };
    const py::module_ errors = py::module_::import("warmserve_rt._errors");
    const char* name = kNames[static_cast<int>(error.kind())];
    const py::object type = py::hasattr(errors, name)
                                ? py::object(errors.attr(name))
                                : py::object(py::module_::import("builtins").attr(name));
    PyErr_SetString(type.ptr(), error.what());
  }
}

WaitFor wait_for(const std::string& name) {
  if (name == "nothing") return WaitFor::none;
  if (name == "streams") return WaitFor::streams;
  if (name == "leases") return WaitFor::leases_and_streams;
  throw Error(ErrorKind::invalid_argument,
              "cannot wait for '" + name + "': wait must be nothing, streams or leases");
}

using FileTuple = std::tuple<
    int, std::string,
    std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>>;
using SegmentTuple = std::tuple<std::uint32_t, std::uint64_t, std::uint64_t, std::uint64_t,
                                std::optional<std::string>>;
using LayerTuple = std::pair<std::uint64_t, std::vector<SegmentTuple>>;
using Checks = std::vector<std::vector<std::pair<std::uint32_t, std::optional<std::uint64_t>>>>;

StreamPriority stream_priority(const std::string& name) {
  if (name == "background") return StreamPriority::background;
  if (name == "normal") return StreamPriority::normal;
  if (name == "urgent") return StreamPriority::urgent;
  throw Error(ErrorKind::invalid_argument,
              "unknown stream priority '" + name + "': it must be background, normal or urgent");
}

// Duplicates the descriptors of files. The iterator may close a file when the next one is
// requested, so at most one file is open twice.
std::vector<File> take_files(const py::iterable& files) {
  std::vector<File> owned;
  for (const py::handle item : files) {
    const auto [descriptor, path, identity] = item.cast<FileTuple>();
    const int duplicate = ::fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (duplicate < 0) {
      const int error = errno;
      const std::string call = "fcntl(F_DUPFD_CLOEXEC) of " + path;
      PyErr_SetObject(PyExc_OSError,
                      py::make_tuple(error, os_failure(call, error, OsLimit::descriptors)).ptr());
      throw py::error_already_set();
    }
    const auto [device, inode, size, mtime, ctime] = identity;
    owned.emplace_back(duplicate, path, FileIdentity{device, inode, size, mtime, ctime});
  }
  return owned;
}

void add_checks(std::vector<LayerShape>& shapes, const Checks& checks) {
  if (checks.empty()) return;
  if (checks.size() != shapes.size())
    throw Error(ErrorKind::invalid_argument,
                "checks must have an entry for each layer, or be empty");
  for (std::size_t i = 0; i < shapes.size(); ++i)
    for (const auto& [granule, digest] : checks[i]) shapes[i].checks.push_back({granule, digest});
}

std::vector<LayerShape> take_shapes(const Layout& layout) {
  const py::gil_scoped_release release;
  std::vector<LayerShape> shapes(layout.bytes.size());
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto segments = layout.segments_of(i);
    shapes[i] = {layout.bytes[i], {segments.begin(), segments.end()}};
  }
  return shapes;
}

std::vector<LayerShape> take_shapes(const std::vector<LayerTuple>& layers) {
  std::vector<LayerShape> shapes;
  for (const auto& [bytes, segments] : layers) {
    LayerShape& shape = shapes.emplace_back();
    shape.bytes = bytes;
    for (const auto& [file, file_offset, layer_offset, length, cast] : segments) {
      Segment& segment = shape.segments.emplace_back(file, file_offset, layer_offset, length);
      if (cast) segment.cast = cast_kind(*cast);
    }
  }
  return shapes;
}

// `Layers` is a Layout or a vector of LayerTuple.
template <typename Layers>
PyModel register_model(const RuntimePtr& runtime, const std::string& name,
                       const py::iterable& files, const Layers& layers, bool writable,
                       const Checks& checks) {
  std::vector<LayerShape> shapes = take_shapes(layers);
  add_checks(shapes, checks);
  std::vector<File> owned = take_files(files);
  const py::gil_scoped_release release;
  const std::vector<LayerShape> freed_without_gil = std::move(shapes);
  return {runtime, runtime->register_model(name, std::move(owned), freed_without_gil, writable,
                                           check_signals)};
}

void reload(Runtime& runtime, const PyModel& model, const py::iterable& files, const Layout& layout,
            const Checks& checks, std::optional<double> timeout) {
  std::vector<LayerShape> shapes = take_shapes(layout);
  add_checks(shapes, checks);
  std::vector<File> owned = take_files(files);
  const py::gil_scoped_release release;
  const std::vector<LayerShape> freed_without_gil = std::move(shapes);
  runtime.reload(model.model, std::move(owned), freed_without_gil, deadline(timeout),
                 check_signals);
}

py::dict driver_calls(Runtime& runtime) {
  py::dict calls;
  for (int i = 0; i < static_cast<int>(Primitive::count); ++i) {
    const auto& count = runtime.device()->count(static_cast<Primitive>(i));
    calls[to_string(static_cast<Primitive>(i))] =
        py::make_tuple(count.calls.load(), count.nanoseconds.load());
  }
  return calls;
}

void bind_runtime(py::module_& m) {
  py::class_<Runtime, RuntimePtr>(m, "Runtime")
      .def(
          py::init([](std::shared_ptr<Driver> driver, std::uint64_t arena, std::uint64_t staging,
                      std::uint64_t host_cache, std::uint64_t granule, std::uint64_t chunk,
                      std::uint64_t headroom, unsigned loaders, double staging_timeout, bool poison,
                      bool fence_device, double background_share, std::uint64_t read_bandwidth,
                      const std::vector<std::shared_ptr<Driver>>& peers,
                      std::shared_ptr<BrokerConnection> broker) {
            const py::gil_scoped_release release;
            const RuntimePtr runtime = Runtime::make(
                std::move(driver),
                {.arena_bytes = arena,
                 .staging_bytes = staging,
                 .host_cache_bytes = host_cache,
                 .granule_bytes = granule,
                 .chunk_bytes = chunk,
                 .headroom_bytes = headroom,
                 .loaders = loaders,
                 .staging_timeout = std::chrono::milliseconds(
                     static_cast<std::int64_t>(std::clamp(staging_timeout, 0.0, 1e9) * 1e3)),
                 .poison = poison,
                 .fence_device = fence_device,
                 .background_share = background_share,
                 .read_bandwidth = read_bandwidth,
                 .broker = std::move(broker)});
            for (const auto& peer : peers)
              runtime->add_route(
                  make_peer_route(std::make_shared<Device>(peer), *runtime->device(), chunk));
            return runtime;
          }),
          py::arg("driver"), py::kw_only(), py::arg("arena"), py::arg("staging"),
          py::arg("host_cache"), py::arg("granule"), py::arg("chunk"), py::arg("headroom"),
          py::arg("loaders"), py::arg("staging_timeout"), py::arg("poison"),
          py::arg("fence_device"), py::arg("background_share"), py::arg("read_bandwidth"),
          py::arg("peers"), py::arg("broker") = nullptr)
      .def("register", &register_model<Layout>, py::arg("name"), py::arg("files"),
           py::arg("layers"), py::arg("writable"), py::arg("checks") = Checks())
      .def("register", &register_model<std::vector<LayerTuple>>, py::arg("name"), py::arg("files"),
           py::arg("layers"), py::arg("writable"), py::arg("checks") = Checks())
      .def("reload", &reload, py::arg("model"), py::arg("files"), py::arg("layers"),
           py::arg("checks"), py::arg("timeout"))
      .def(
          "unregister",
          [](Runtime& self, const PyModel& model, std::optional<double> timeout,
             const std::string& wait, const py::object& poll) {
            self.unregister(model.model, deadline(timeout), polling(poll), wait_for(wait));
          },
          py::arg("model"), py::arg("timeout"), py::arg("wait"), py::arg("poll") = py::none(),
          NoGil())
      .def(
          "prewarm",
          [](const RuntimePtr& self, const PyModel& model, const Layers& layers, int priority,
             std::optional<double> deadline_in, double evict_below) {
            reservation_of(model);
            return PyTicket{
                self,
                self->prewarm(select(model, layers), priority, deadline(deadline_in), evict_below),
                model.model};
          },
          py::arg("model"), py::arg("layers"), py::arg("priority"), py::arg("deadline"),
          py::arg("evict_below"))
      .def(
          "prewarm_host",
          [](const RuntimePtr& self, const PyModel& model, const Layers& layers, int priority,
             std::optional<double> deadline_in) {
            return PyTicket{
                self, self->prewarm_host(select(model, layers), priority, deadline(deadline_in)),
                model.model};
          },
          py::arg("model"), py::arg("layers"), py::arg("priority"), py::arg("deadline"))
      .def(
          "swap",
          [](const RuntimePtr& self, const PyModel& evict, const PyModel& load, int priority) {
            reservation_of(load);
            return PyTicket{self, self->swap(evict.model, load.model, priority), load.model};
          },
          py::arg("evict"), py::arg("load"), py::arg("priority"))
      .def(
          "evict",
          [](Runtime& self, const PyModel& model, const Layers& layers,
             std::optional<double> timeout, const std::string& wait, const py::object& poll) {
            self.evict(select(model, layers), deadline(timeout), polling(poll), wait_for(wait));
          },
          py::arg("model"), py::arg("layers"), py::arg("timeout"), py::arg("wait"),
          py::arg("poll") = py::none(), NoGil())
      .def("fileno", py::overload_cast<>(&Runtime::fileno))
      .def("trim", &Runtime::trim, NoGil())
      .def(
          "set_keep_value",
          [](Runtime& self, const PyModel& model, double value,
             std::optional<std::uint32_t> layer) {
            if (std::isnan(value))
              throw Error(ErrorKind::invalid_argument, "the keep value must not be nan");
            layer ? self.set_keep_value(model.model, *layer, value)
                  : self.set_keep_value(model.model, value);
          },
          py::arg("model"), py::arg("value"), py::arg("layer") = py::none())
      .def(
          "set_keep_values",
          [](Runtime& self, const PyModel& model, const std::vector<double>& values) {
            if (std::any_of(values.begin(), values.end(), [](double x) { return std::isnan(x); }))
              throw Error(ErrorKind::invalid_argument, "a keep value must not be nan");
            self.set_keep_values(model.model, values);
          },
          py::arg("model"), py::arg("values"))
      .def(
          "begin_lease",
          [](const RuntimePtr& self, const py::sequence& models, std::uint64_t owner,
             const Layers& layers) {
            std::vector<Selection> wanted;
            wanted.reserve(models.size());
            for (const py::handle model : models) {
              const PyModel& each = model.cast<PyModel&>();
              wanted.push_back(select(each, layers));
              if (!each.model->reserved.load(std::memory_order_acquire)) reservation_of(each);
            }
            return PyLease(self, self->begin_lease(std::move(wanted), owner));
          },
          py::arg("models"), py::arg("owner"), py::arg("layers") = py::none())
      .def(
          "guard",
          [](const RuntimePtr& self, const PyModel& model, const Layers& layers,
             std::optional<double> timeout) {
            reservation_of(model);
            return PyGuard{self, std::make_unique<Guard>(*self, select(model, layers)), timeout};
          },
          py::arg("model"), py::arg("layers"), py::arg("timeout"))
      .def(
          "read_back",
          [](Runtime& self, const PyModel& model, std::uint32_t layer, const py::buffer& out) {
            const py::buffer_info info = out.request(true);
            if (layer < model.model->layers.size() &&
                static_cast<std::uint64_t>(info.size * info.itemsize) <
                    model.model->layers[layer].bytes)
              throw Error(ErrorKind::invalid_argument, "the buffer is smaller than the layer");
            const py::gil_scoped_release release;
            self.read_back(model.model, layer, static_cast<std::byte*>(info.ptr));
          },
          py::arg("model"), py::arg("layer"), py::arg("out"))
      .def(
          "digest",
          [](Runtime& self, const PyModel& model, std::uint32_t layer, std::uint64_t piece) {
            return self.digest(model.model, layer, piece);
          },
          py::arg("model"), py::arg("layer"), py::arg("piece"), NoGil())
      .def(
          "stream",
          [](Runtime& self, const std::string& priority) {
            return PyStream{std::make_shared<Stream>(self.device(), stream_priority(priority))};
          },
          py::arg("priority"), NoGil())
      .def(
          "adopt_stream",
          [](Runtime& self, std::uint64_t handle, bool refuse_capture) {
            std::shared_ptr<Stream> stream = Stream::adopt(self.device(), handle);
            if (refuse_capture) stream->refuse_capture();
            return PyStream{std::move(stream)};
          },
          py::arg("handle"), py::arg("refuse_capture") = false, NoGil())
      .def(
          "device_memory",
          [](const Runtime& self) {
            std::uint64_t available = 0, total = 0;
            self.device()->memory(&available, &total);
            return std::pair(available, total);
          },
          NoGil())
      .def("drop_route", &Runtime::drop_route, py::arg("name"), NoGil())
      .def("state", &Runtime::state)
      .def("driver_calls", &driver_calls)
      .def("step", &Runtime::step, NoGil())
      .def("stop", &Runtime::stop, NoGil())
      .def("check_invariants", &Runtime::check_invariants)
      .def(
          "close",
          [](Runtime& self, std::optional<double> timeout, const std::string& wait,
             const py::object& poll) {
            self.close(polling(poll), deadline(timeout), wait_for(wait));
          },
          py::arg("timeout") = py::none(), py::arg("wait") = "streams",
          py::arg("poll") = py::none(), NoGil());
}

}  // namespace
}  // namespace warmserve

PYBIND11_MODULE(_native, m) {
  using namespace warmserve;
  py::register_exception_translator(translate_errors);
  bind_drivers(m);
  bind_handles(m);
  bind_headers(m);
  bind_state(m);
  bind_broker(m);
  bind_runtime(m);
  bind_kernels(m);
  m.def("process_exits", &Device::process_exits,
        "Stop all use of devices. The exit of the process frees all remaining device memory.");
}
