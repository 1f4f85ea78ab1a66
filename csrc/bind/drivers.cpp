#include "bind/drivers.h"

#include <fcntl.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstring>
#include <optional>

#include "base/os_failure.h"
#include "driver/checked/faulty.h"
#include "driver/checked/strict.h"
#include "memory/contents.h"
#include "memory/vmm.h"

namespace py = pybind11;

namespace warmserve {
namespace {

Primitive primitive(const std::string& name) {
  for (int i = 0; i < static_cast<int>(Primitive::count); ++i)
    if (name == to_string(static_cast<Primitive>(i))) return static_cast<Primitive>(i);
  throw Error(ErrorKind::invalid_argument, "unknown driver primitive '" + name + "'");
}

Status status(const std::string& name) {
  if (name == "failed") return Status::failed;
  if (name == "out_of_memory") return Status::out_of_memory;
  if (name == "device_lost") return Status::device_lost;
  throw Error(ErrorKind::invalid_argument,
              "status must be failed, out_of_memory or device_lost, got '" + name + "'");
}

// Returns the total seconds per primitive for `batch` granules at a time. The granules are created
// once, then mapped, made accessible and unmapped `rounds` times, then released. "cycles" is the
// time of all rounds. Throws if a primitive fails, after releasing everything.
std::map<std::string, double> time_driver(const std::shared_ptr<Driver>& driver,
                                          std::uint64_t granule, std::size_t batch,
                                          std::size_t rounds, bool writable) {
  const py::gil_scoped_release release;
  std::map<std::string, double> taken;
  const auto timed = [&](const char* name, auto work) {
    const auto begin = Clock::now();
    work();
    taken[name] += std::chrono::duration<double>(Clock::now() - begin).count();
  };
  const auto device = std::make_shared<Device>(driver);
  const auto reservation = std::make_shared<Reservation>(device, batch * granule);
  std::vector<Granule> granules;
  std::vector<Handle> handles;
  timed("create", [&] {
    for (std::size_t i = 0; i < batch; ++i) granules.emplace_back(device, granule);
  });
  for (const Granule& made : granules) handles.push_back(made.handle());
  double map = 0, access = 0, unmap = 0;
  const auto since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  timed("cycles", [&] {
    for (std::size_t round = 0; round < rounds; ++round) {
      auto begin = Clock::now();
      Mapping mapping(reservation, 0, handles, granule);
      map += since(begin);
      begin = Clock::now();
      mapping.set_access(writable ? Access::read_write : Access::read);
      access += since(begin);
      begin = Clock::now();
      mapping.unmap();
      unmap += since(begin);
    }
  });
  taken["map"] = map;
  taken["set_access"] = access;
  taken["unmap"] = unmap;
  timed("release", [&] { granules.clear(); });
  return taken;
}

// A granule, mapped at an address of its own, for tests of the driver.
class MappedGranule {
 public:
  MappedGranule(const std::shared_ptr<Driver>& driver, std::uint64_t bytes,
                const std::optional<std::pair<int, std::uint64_t>>& shared, bool writable)
      : device_(std::make_shared<Device>(driver)),
        reservation_(std::make_shared<Reservation>(device_, bytes)),
        granule_(shared ? Granule(device_, SharedGranule{shared->first, shared->second}, bytes)
                        : Granule(device_, bytes)),
        mapping_(reservation_, 0, std::array{granule_.handle()}, bytes),
        stream_(device_),
        staging_(device_, bytes) {
    mapping_.set_access(writable ? Access::read_write : Access::read);
  }

  // Returns a descriptor, which the caller closes, and the offset.
  std::pair<int, std::uint64_t> share() const {
    const ExportedGranule exported = granule_.exported();
    const int descriptor = ::fcntl(exported.shared().descriptor, F_DUPFD_CLOEXEC, 0);
    if (descriptor < 0)
      throw Error(ErrorKind::general, os_failure("fcntl(F_DUPFD_CLOEXEC)", errno));
    return {descriptor, exported.shared().offset};
  }
  py::bytes read(std::uint64_t count) {
    {
      const py::gil_scoped_release release;
      stream_.copy_from_device(staging_.data(), mapping_.address(), count);
      stream_.synchronize();
    }
    return {reinterpret_cast<const char*>(staging_.data()), count};
  }
  void write(const std::string& bytes) {
    const py::gil_scoped_release release;
    std::memcpy(staging_.data(), bytes.data(), bytes.size());
    stream_.copy_to_device(mapping_.address(), staging_.data(), bytes.size());
    stream_.synchronize();
  }
  Address address() const noexcept { return mapping_.address(); }

 private:
  DevicePtr device_;
  ReservationPtr reservation_;
  Granule granule_;
  Mapping mapping_;
  Stream stream_;
  PinnedRegion staging_;
};

}  // namespace

void bind_drivers(py::module_& m) {
  py::class_<Driver, std::shared_ptr<Driver>>(m, "Driver")
      .def_property_readonly("name", [](const Driver& d) { return d.facts().name; })
      .def_property_readonly("granularity", [](const Driver& d) { return d.facts().granularity; })
      .def_property_readonly("cuda_ordinal", [](const Driver& d) { return d.facts().cuda_ordinal; })
      .def_property_readonly("no_kernels", [](const Driver& d) { return d.facts().no_kernels; })
      .def(
          "memory",
          [](Driver& d) {
            std::uint64_t available = 0, total = 0;
            if (d.memory(&available, &total) != Status::ok)
              throw Error(ErrorKind::general,
                          d.facts().name + " does not report its memory: " + d.detail());
            return std::pair(available, total);
          },
          py::call_guard<py::gil_scoped_release>());
  m.def(
      "host_driver",
      [](bool threads, bool host_view, bool huge_pages, const std::string& root, int memory,
         int contents) {
        return make_host_driver({threads, host_view, huge_pages, root, memory, contents});
      },
      py::kw_only(), py::arg("threads") = true, py::arg("host_view") = true,
      py::arg("huge_pages") = true, py::arg("root") = "", py::arg("memory") = -1,
      py::arg("contents") = -1);
  m.def("bytes_of_contents", &Contents::bytes_for, py::arg("granules"));
  m.def(
      "cuda_driver",
      [](const std::string& library, int ordinal, const py::bytes& kernels,
         const std::vector<int>& peers) {
        CudaOptions options{library, ordinal, kernels, peers};
        const py::gil_scoped_release release;
        return make_cuda_driver(options);
      },
      py::kw_only(), py::arg("library") = "libcuda.so.1", py::arg("ordinal") = 0,
      py::arg("kernels") = py::bytes(), py::arg("peers") = std::vector<int>());
  py::class_<MappedGranule>(m, "MappedGranule")
      .def(py::init<const std::shared_ptr<Driver>&, std::uint64_t,
                    const std::optional<std::pair<int, std::uint64_t>>&, bool>(),
           py::call_guard<py::gil_scoped_release>(), py::arg("driver"), py::arg("nbytes"),
           py::kw_only(), py::arg("shared") = py::none(), py::arg("writable") = true)
      .def("share", &MappedGranule::share)
      .def("read", &MappedGranule::read, py::arg("nbytes"))
      .def("write", &MappedGranule::write, py::arg("data"))
      .def_property_readonly("address", &MappedGranule::address);
  m.def("time_driver", &time_driver, py::arg("driver"), py::kw_only(), py::arg("granule"),
        py::arg("batch"), py::arg("rounds"), py::arg("writable") = true);
  py::class_<FaultyDriver, Driver, std::shared_ptr<FaultyDriver>>(m, "FaultyDriver")
      .def(py::init<std::shared_ptr<Driver>>(), py::arg("inner"))
      .def(
          "arm",
          [](FaultyDriver& self,
             const std::vector<std::pair<std::uint64_t, std::optional<std::uint64_t>>>& ranges,
             const std::optional<std::string>& only, const std::string& as) {
            std::vector<FaultyDriver::Range> parsed;
            for (const auto& [first, last] : ranges)
              parsed.push_back({first, last.value_or(~0ull)});
            self.arm(std::move(parsed), only ? std::optional(primitive(*only)) : std::nullopt,
                     status(as));
          },
          py::arg("ranges"), py::kw_only(), py::arg("only") = py::none(),
          py::arg("status") = "failed")
      .def("disarm", &FaultyDriver::disarm)
      .def(
          "delay",
          [](FaultyDriver& self, const std::string& name, double seconds) {
            self.delay(primitive(name),
                       std::chrono::microseconds(static_cast<std::int64_t>(seconds * 1e6)));
          },
          py::arg("primitive"), py::arg("seconds"))
      .def("cap_memory", &FaultyDriver::cap_memory, py::arg("nbytes"))
      .def_property_readonly("calls", &FaultyDriver::calls)
      .def_property_readonly("injected", &FaultyDriver::injected)
      .def_property_readonly("last", &FaultyDriver::last);
  py::class_<StrictDriver, Driver, std::shared_ptr<StrictDriver>>(m, "StrictDriver")
      .def(py::init<std::shared_ptr<Driver>>(), py::arg("inner"))
      .def_property_readonly("violations", &StrictDriver::violations)
      .def_property_readonly("live", &StrictDriver::live);
}

}  // namespace warmserve
