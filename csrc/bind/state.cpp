#include "bind/state.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>

#include "runtime/runtime.h"

namespace py = pybind11;

namespace warmserve {
namespace {

// Returns each layer as a `row`, a subclass of tuple with the fields (residency, bytes, granules,
// leases, keep value, cached). Rows are allocated like the interpreter's own tuples, because a
// snapshot of many layers makes many of them.
py::tuple layer_rows(const ModelState& state, const py::type& row) {
  auto* const type = reinterpret_cast<PyTypeObject*>(row.ptr());
  if (!PyType_IsSubtype(type, &PyTuple_Type))
    throw Error(ErrorKind::invalid_argument, "row must be a subclass of tuple");
  py::tuple rows(state.layers.size());
  const py::str names[] = {"absent", "filling", "resident", "draining"};
  Py_ssize_t at = 0;
  for (const LayerState& layer : state.layers) {
    PyObject* const name = names[static_cast<std::size_t>(layer.residency)].ptr();
    Py_INCREF(name);
    PyObject* const values[] = {name,
                                PyLong_FromUnsignedLongLong(layer.bytes),
                                PyLong_FromUnsignedLongLong(layer.granules),
                                PyLong_FromUnsignedLong(layer.leases),
                                PyFloat_FromDouble(layer.keep_value),
                                PyBool_FromLong(layer.cached)};
    PyObject* const made = type->tp_alloc(type, std::size(values));
    if (!made || std::find(std::begin(values), std::end(values), nullptr) != std::end(values)) {
      for (PyObject* const value : values) Py_XDECREF(value);
      Py_XDECREF(made);
      throw py::error_already_set();
    }
    for (std::size_t i = 0; i < std::size(values); ++i)
      PyTuple_SET_ITEM(made, static_cast<Py_ssize_t>(i), values[i]);
    PyTuple_SET_ITEM(rows.ptr(), at++, made);
  }
  return rows;
}

}  // namespace

void bind_state(py::module_& m) {
  py::class_<ModelState>(m, "ModelState")
      .def_readonly("name", &ModelState::name)
      .def_readonly("leases", &ModelState::leases)
      .def_readonly("backing_epoch", &ModelState::backing_epoch)
      .def("layers", &layer_rows, py::arg("row"));
  py::class_<RouteState>(m, "RouteState")
      .def_readonly("name", &RouteState::name)
      .def_readonly("nbytes", &RouteState::bytes)
      .def_readonly("bandwidth", &RouteState::bandwidth)
      .def_readonly("error", &RouteState::error);
  py::class_<HostCacheState>(m, "HostCacheState")
      .def_property_readonly("budget_bytes",
                             [](const HostCacheState& s) { return s.slabs.budget_bytes; })
      .def_property_readonly("pinned_bytes",
                             [](const HostCacheState& s) { return s.slabs.pinned_bytes; })
      .def_property_readonly("bytes_in_use",
                             [](const HostCacheState& s) { return s.slabs.lent_bytes; })
      .def_property_readonly("error", [](const HostCacheState& s) { return s.slabs.error; })
      .def_readonly("layers", &HostCacheState::layers)
      .def_property_readonly("hits", [](const HostCacheState& s) { return s.counters.hits; })
      .def_property_readonly("misses", [](const HostCacheState& s) { return s.counters.misses; })
      .def_property_readonly("hit_bytes",
                             [](const HostCacheState& s) { return s.counters.hit_bytes; })
      .def_property_readonly("evictions",
                             [](const HostCacheState& s) { return s.counters.evictions; });
  py::class_<RuntimeState>(m, "RuntimeState")
      .def_readonly("host_cache", &RuntimeState::host_cache)
      .def_readonly("granule_bytes", &RuntimeState::granule_bytes)
      .def_readonly("pinned_bytes", &RuntimeState::pinned_bytes)
      .def_readonly("headroom_bytes", &RuntimeState::headroom_bytes)
      .def_readonly("granules", &RuntimeState::granules)
      .def_readonly("granules_free", &RuntimeState::granules_free)
      .def_readonly("granules_trimmed", &RuntimeState::granules_trimmed)
      .def_readonly("leases", &RuntimeState::leases)
      .def_readonly("staging_chunks_free", &RuntimeState::staging_chunks_free)
      .def_property_readonly("bytes_loaded",
                             [](const RuntimeState& s) { return s.counters.bytes_loaded; })
      .def_property_readonly("layers_loaded",
                             [](const RuntimeState& s) { return s.counters.layers_loaded; })
      .def_property_readonly("layers_evicted",
                             [](const RuntimeState& s) { return s.counters.layers_evicted; })
      .def_property_readonly("layers_examined",
                             [](const RuntimeState& s) { return s.counters.layers_examined; })
      .def_readonly("routes", &RuntimeState::routes)
      .def_readonly("models", &RuntimeState::models);
}

}  // namespace warmserve
