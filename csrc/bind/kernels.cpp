#include "bind/kernels.h"

#include <pybind11/numpy.h>

#include <optional>
#include <string>

#include "base/error.h"

namespace py = pybind11;

namespace warmserve {
namespace {

// A contiguous buffer, which keeps its address while this object lives. If the exporter has no
// contiguous buffer, its own exception is thrown.
class Bytes {
 public:
  Bytes(const py::object& object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
      throw py::error_already_set();
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { PyBuffer_Release(&view_); }
  Address address() const { return reinterpret_cast<Address>(view_.buf); }
  std::uint64_t size() const { return static_cast<std::uint64_t>(view_.len); }

 private:
  Py_buffer view_{};
};

[[noreturn]] void refuse(const std::string& why) { throw Error(ErrorKind::invalid_argument, why); }

struct Named {
  const char* name;
  CastKind kind;
};
constexpr Named kKinds[] = {
    {"f32_to_bf16", CastKind::f32_to_bf16},         {"f32_to_f16", CastKind::f32_to_f16},
    {"f16_to_f32", CastKind::f16_to_f32},           {"f16_to_bf16", CastKind::f16_to_bf16},
    {"bf16_to_f32", CastKind::bf16_to_f32},         {"bf16_to_f16", CastKind::bf16_to_f16},
    {"f8_e4m3_to_bf16", CastKind::f8_e4m3_to_bf16}, {"f8_e5m2_to_bf16", CastKind::f8_e5m2_to_bf16}};

void expect(const char* what, std::uint64_t bytes, std::uint64_t expected) {
  if (bytes != expected)
    refuse(std::string(what) + " has " + std::to_string(bytes) + " bytes, expected " +
           std::to_string(expected));
}

void check(const KernelCall& call) {
  if (const Misuse wrong = misuse(call); wrong != Misuse::none) refuse(text_of(wrong));
}

void run(const KernelCall& call) {
  check(call);
  const py::gil_scoped_release release;
  run_on_cpu(call);
}

py::array_t<std::uint64_t> digest(const py::object& buffer, std::uint64_t granule_bytes) {
  const Bytes from(buffer, false);
  if (granule_bytes == 0) refuse("granule_bytes must be positive");
  const std::uint64_t granules = ceil_div(from.size(), granule_bytes);
  py::array_t<std::uint64_t> out(static_cast<py::ssize_t>(granules));
  run(DigestCall{from.address(), from.size(), granule_bytes,
                 reinterpret_cast<Address>(out.mutable_data())});
  return out;
}

void cast(const std::string& kind, const py::object& from, const py::object& to,
          const py::object& scales, std::uint64_t columns, std::uint64_t block_rows,
          std::uint64_t block_columns) {
  CastCall call{.kind = cast_kind(kind),
                .columns = columns,
                .block_rows = block_rows,
                .block_columns = block_columns};
  const Bytes source(from, false), target(to, true);
  std::optional<Bytes> factors;
  call.from = source.address();
  call.to = target.address();
  const std::uint64_t width = widths(call.kind).from;
  if (source.size() % width != 0) refuse("from must have a whole number of elements");
  call.count = source.size() / width;
  if (!scales.is_none()) {
    factors.emplace(scales, false);
    call.scales = factors->address();
  }
  check(call);
  const std::vector<Touched> all = touched(call);
  expect("to", target.size(), all[1].bytes);
  if (factors) expect("scales", factors->size(), all[2].bytes);
  run(call);
}

void gather_rows(const py::object& from, const py::object& to, std::uint64_t rows,
                 std::uint64_t row_bytes, std::uint64_t pitch) {
  const Bytes source(from, false), target(to, true);
  const GatherCall call{source.address(), target.address(), rows, row_bytes, pitch};
  check(call);
  const std::vector<Touched> all = touched(call);
  if (source.size() < all[0].bytes)
    refuse("from has " + std::to_string(source.size()) + " bytes, but the rows end at byte " +
           std::to_string(all[0].bytes));
  expect("to", target.size(), all[1].bytes);
  run(call);
}

}  // namespace

const char* cast_name(CastKind kind) {
  for (const Named& each : kKinds)
    if (each.kind == kind) return each.name;
  throw std::logic_error("a cast without a name");
}

CastKind cast_kind(const std::string& name) {
  for (const Named& one : kKinds)
    if (name == one.name) return one.kind;
  refuse("unknown cast '" + name + "'");
}

void bind_kernels(py::module_& m) {
  m.def("digest", &digest, py::arg("buffer"), py::arg("granule_bytes"));
  m.def("cast", &cast, py::arg("kind"), py::arg("from_"), py::arg("to"),
        py::arg("scales") = py::none(), py::arg("columns") = 0, py::arg("block_rows") = 0,
        py::arg("block_columns") = 0);
  m.def("gather_rows", &gather_rows, py::arg("from_"), py::arg("to"), py::arg("rows"),
        py::arg("row_bytes"), py::arg("pitch"));
}

}  // namespace warmserve
