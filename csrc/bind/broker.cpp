#include "bind/broker.h"

#include <pybind11/stl.h>

#include "bind/handles.h"
#include "broker/server.h"

namespace py = pybind11;

namespace warmserve {

using NoGil = py::call_guard<py::gil_scoped_release>;

void bind_broker(py::module_& m) {
  py::class_<BrokerConnection, std::shared_ptr<BrokerConnection>>(m, "BrokerConnection")
      .def(py::init([](const std::string& path, const std::string& version, const std::string& name,
                       std::optional<double> timeout, double patience) {
             const py::gil_scoped_release release;
             const auto made = std::make_shared<BrokerConnection>(path, version, name,
                                                                  deadline(timeout), check_signals);
             made->patience = std::chrono::milliseconds(static_cast<std::int64_t>(patience * 1e3));
             return made;
           }),
           py::arg("path"), py::kw_only(), py::arg("version"), py::arg("name"), py::arg("timeout"),
           py::arg("patience") = 0.0)
      .def_readonly("granule_bytes", &BrokerConnection::granule_bytes)
      .def_readonly("granules", &BrokerConnection::granules)
      .def(
          "state",
          [](BrokerConnection& self, std::optional<double> timeout) {
            return broker_state(self, deadline(timeout), check_signals);
          },
          py::arg("timeout"), NoGil());
  py::class_<BrokerState> state(m, "BrokerState");
  py::class_<BrokerState::Mapped>(m, "MappedState")
      .def_readonly("model", &BrokerState::Mapped::model)
      .def_readonly("layers", &BrokerState::Mapped::layers)
      .def_readonly("layers_held", &BrokerState::Mapped::layers_held)
      .def_readonly("bytes", &BrokerState::Mapped::bytes);
  py::class_<BrokerState::Client>(m, "ClientState")
      .def_readonly("pid", &BrokerState::Client::pid)
      .def_readonly("name", &BrokerState::Client::name)
      .def_readonly("stuck", &BrokerState::Client::stuck)
      .def_readonly("ended", &BrokerState::Client::ended)
      .def_readonly("mapped", &BrokerState::Client::mapped);
  py::class_<BrokerState::Model>(m, "BrokerModelState")
      .def_readonly("name", &BrokerState::Model::name)
      .def_readonly("bytes", &BrokerState::Model::bytes)
      .def_readonly("bytes_resident", &BrokerState::Model::bytes_resident)
      .def_readonly("leases", &BrokerState::Model::leases);
  state.def_readonly("granule_bytes", &BrokerState::granule_bytes)
      .def_readonly("granules", &BrokerState::granules)
      .def_readonly("granules_free", &BrokerState::granules_free)
      .def_readonly("bytes_loaded", &BrokerState::bytes_loaded)
      .def_readonly("models", &BrokerState::models)
      .def_readonly("clients", &BrokerState::clients);
  py::class_<BrokerServer, std::shared_ptr<BrokerServer>>(m, "BrokerServer")
      .def(py::init([](const RuntimePtr& runtime, const std::string& path,
                       const std::string& version, double patience, int keeper,
                       const std::vector<std::pair<int, int>>& former_clients) {
             const py::gil_scoped_release release;
             return BrokerServer::make(
                 *runtime, BrokerServer::Options{.path = path,
                                                 .version = version,
                                                 .patience = std::chrono::milliseconds(
                                                     static_cast<std::int64_t>(patience * 1e3)),
                                                 .keeper = keeper,
                                                 .former_clients = former_clients});
           }),
           py::arg("runtime"), py::kw_only(), py::arg("path"), py::arg("version"),
           py::arg("patience"), py::arg("keeper") = -1,
           py::arg("former_clients") = std::vector<std::pair<int, int>>(), py::keep_alive<1, 2>())
      .def("stop", &BrokerServer::stop, NoGil());
}

}  // namespace warmserve
