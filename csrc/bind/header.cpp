#include "bind/header.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bind/dlpack.h"
#include "bind/kernels.h"
#include "checkpoint/grouping.h"
#include "checkpoint/layout.h"
#include "checkpoint/merging.h"

namespace py = pybind11;

namespace warmserve {
namespace {

using TablePtr = std::shared_ptr<TensorTable>;
using StringsPtr = std::shared_ptr<StringTable>;
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Returns a shared pointer whose object is destroyed without the GIL on any thread, because the
// object may be large.
template <typename T>
std::shared_ptr<T> share(T&& value) {
  return {new T(std::move(value)), [](T* pointer) {
            std::optional<py::gil_scoped_release> release;
            if (PyGILState_Check()) release.emplace();
            delete pointer;
          }};
}

py::str text(std::string_view string) { return {string.data(), string.size()}; }

// Returns the UTF-8 bytes of a str; nullopt if it has a lone surrogate, which no table contains.
std::optional<std::string_view> bytes_of(const py::str& string) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(string.ptr(), &size);
  if (!data) {
    PyErr_Clear();
    return std::nullopt;
  }
  return std::string_view(data, static_cast<std::size_t>(size));
}

std::string_view bytes_of(const py::bytes& bytes) { return bytes; }

template <typename T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

// Reads the next file's header. Returns (metadata, None); or, if another file has a tensor of the
// same name, (None, (message, number of that file)).
py::tuple add(TensorTable& table, const py::bytes& raw, std::uint64_t start, std::uint64_t size) {
  const std::string_view header = bytes_of(raw);
  std::uint32_t other = table.files;
  const std::uint32_t own = table.files;
  StringsPtr metadata;
  try {
    const py::gil_scoped_release release;
    metadata = share(read_header(table, header, start, size, other));
  } catch (const Error& error) {
    if (other == own) throw;
    return py::make_tuple(py::none(), py::make_tuple(error.what(), other));
  }
  return py::make_tuple(metadata, py::none());
}

py::list names(const TensorTable& table, std::size_t first, std::size_t last) {
  last = std::min(last, table.order.size());
  py::list found;
  for (std::size_t i = first; i < last; ++i) found.append(text(table.names[table.order[i]]));
  return found;
}

py::tuple shape_of(const TensorTable& table, const Tensor& tensor) {
  const auto dims = table.shape(tensor);
  py::tuple shape(dims.size());
  for (std::size_t i = 0; i < dims.size(); ++i) shape[i] = py::int_(dims[i]);
  return shape;
}

py::tuple entry(const TensorTable& table, std::uint32_t number) {
  const Tensor& tensor = table.tensors.at(number);
  return py::make_tuple(text(table.names[number]), tensor.type, shape_of(table, tensor),
                        tensor.file, tensor.offset, tensor.bytes);
}

// Returns a table of tensors that have only names and sizes.
TablePtr named(const std::vector<std::string>& names, const std::vector<std::uint64_t>& sizes) {
  TablePtr table = share(TensorTable());
  for (std::size_t i = 0; i < names.size(); ++i) {
    table->names.pending() += names[i];
    if (!table->names.add_pending().second)
      throw Error(ErrorKind::invalid_argument, "tensor names must be unique");
    Tensor tensor;
    tensor.bytes = sizes.at(i);
    table->tensors.push_back(tensor);
    table->order.push_back(static_cast<std::uint32_t>(i));
  }
  return table;
}

py::list groups_by_name(const TensorTable& table) {
  const Groups groups = group_by_name(table, false);
  py::list found;
  std::size_t begin = 0;
  for (std::uint32_t group = 0; group < groups.names.size(); ++group) {
    py::list members;
    for (; begin < groups.members.size() && groups.of[groups.members[begin]] == group; ++begin)
      members.append(text(table.names[groups.members[begin]]));
    found.append(py::make_tuple(text(groups.names[group]), members));
  }
  return found;
}

std::vector<std::uint8_t> checked_types(const TensorTable& table,
                                        const Array<std::uint8_t>& types) {
  const auto given = span_of(types);
  if (!given.empty() && given.size() != table.tensors.size())
    throw Error(ErrorKind::invalid_argument, "types must be empty or have an entry per tensor");
  for (const std::uint8_t type : given)
    if (type >= element_types().size())
      throw Error(ErrorKind::invalid_argument, "unknown element type");
  return {given.begin(), given.end()};
}

std::shared_ptr<Layout> lay_out_by_name(const TablePtr& table, bool experts,
                                        const Array<std::uint8_t>& types, std::uint64_t granule,
                                        double max_padding) {
  std::vector<std::uint8_t> casts = checked_types(*table, types);
  const py::gil_scoped_release release;
  const Groups groups = group_by_name(*table, experts);
  return share(
      merge(lay_out(table, groups.names, groups.of, std::move(casts)), granule, max_padding));
}

std::shared_ptr<Layout> lay_out_groups(const TablePtr& table, const std::vector<std::string>& names,
                                       const Array<std::uint32_t>& group_of,
                                       const Array<std::uint8_t>& types) {
  const auto given = span_of(group_of);
  if (given.size() != table->tensors.size())
    throw Error(ErrorKind::invalid_argument, "group_of must have an entry per tensor");
  std::vector<std::uint8_t> casts = checked_types(*table, types);
  const std::vector<std::uint32_t> groups(given.begin(), given.end());
  const py::gil_scoped_release release;
  StringList list;
  for (const std::string& name : names) list.add(name);
  for (const std::uint32_t group : groups)
    if (group >= list.size())
      throw Error(ErrorKind::invalid_argument, "group_of must contain indices of names only");
  return share(lay_out(table, list, groups, std::move(casts)));
}

py::tuple tensor(const Layout& layout, std::uint32_t number) {
  const TensorTable& table = *layout.table;
  const Layout::Place& place = layout.places[number];
  return py::make_tuple(text(table.names[number]), layout.types[number],
                        shape_of(table, table.tensors[number]), place.layer, place.offset,
                        place.bytes);
}

void check_layer(const Layout& layout, std::size_t index) {
  if (index >= layout.bytes.size()) throw py::index_error("layer index out of range");
}

// Returns the layer's tensors [first, last). A layer may have a million tensors, so Python reads
// some at a time.
py::list tensors_of(const Layout& layout, std::size_t index, std::size_t first, std::size_t last) {
  check_layer(layout, index);
  const auto members = layout.members_of(index);
  py::list found;
  for (std::size_t i = first; i < std::min(last, members.size()); ++i)
    found.append(tensor(layout, members[i]));
  return found;
}

py::list segments_of(const Layout& layout, std::size_t index, std::size_t first, std::size_t last) {
  check_layer(layout, index);
  const auto segments = layout.segments_of(index);
  py::list found;
  for (std::size_t i = first; i < std::min(last, segments.size()); ++i) {
    const Segment& segment = segments[i];
    const py::object cast =
        segment.cast ? py::object(py::str(cast_name(*segment.cast))) : py::none();
    found.append(py::make_tuple(segment.file, segment.file_offset, segment.layer_offset,
                                segment.bytes, cast));
  }
  return found;
}

// Returns for each name whether it begins with one of the stems and a dot.
std::vector<bool> under_stems(const py::list& names, const py::list& stems) {
  const auto views = [](const py::list& list) {
    std::vector<std::string_view> found;
    found.reserve(list.size());
    for (const py::handle each : list)
      found.push_back(bytes_of(py::reinterpret_borrow<py::str>(each)).value_or(""));
    return found;
  };
  const auto of_names = views(names), of_stems = views(stems);
  const py::gil_scoped_release release;
  return begin_with_stems(of_names, of_stems);
}

}  // namespace

void bind_headers(py::module_& m) {
  py::class_<StringTable, StringsPtr>(m, "StringTable")
      .def("__len__", [](const StringTable& self) { return self.names.size(); })
      .def("find",
           [](const StringTable& self, const py::str& name) -> py::object {
             const auto bytes = bytes_of(name);
             const auto number = bytes ? self.names.find(*bytes) : std::nullopt;
             if (!number) return py::none();
             return text(self.values[*number]);
           })
      .def("items", [](const StringTable& self, std::uint32_t first, std::uint32_t last) {
        py::list found;
        for (std::uint32_t i = first; i < std::min(last, self.names.size()); ++i)
          found.append(py::make_tuple(text(self.names[i]), text(self.values[i])));
        return found;
      });
  py::class_<TensorTable, TablePtr>(m, "TensorTable")
      .def(py::init([] { return share(TensorTable()); }))
      .def(py::init(&named), py::arg("names"), py::arg("sizes"))
      .def("__len__", [](const TensorTable& self) { return self.order.size(); })
      .def("add", &add, py::arg("header"), py::arg("start"), py::arg("size"))
      .def("names", &names, py::arg("first"), py::arg("last"))
      .def("find",
           [](const TensorTable& self, const py::str& name) -> std::optional<std::uint32_t> {
             const auto bytes = bytes_of(name);
             return bytes ? self.names.find(*bytes) : std::nullopt;
           })
      .def("entry", &entry, py::arg("number"))
      .def("types",
           [](const TensorTable& self) {
             py::array_t<std::uint8_t> types(static_cast<py::ssize_t>(self.tensors.size()));
             std::uint8_t* out = types.mutable_data();
             for (const Tensor& tensor : self.tensors) *out++ = tensor.type;
             return types;
           })
      .def("groups", &groups_by_name);
  py::class_<Layout, std::shared_ptr<Layout>>(m, "Layout")
      .def("__len__", [](const Layout& self) { return self.bytes.size(); })
      .def_readonly("nbytes", &Layout::total)
      .def("layer",
           [](const Layout& self, std::size_t index) {
             check_layer(self, index);
             return py::make_tuple(text(self.names[static_cast<std::uint32_t>(index)]),
                                   self.bytes[index], self.members_of(index).size(),
                                   self.segments_of(index).size());
           })
      .def("tensors", &tensors_of, py::arg("layer"), py::arg("first"), py::arg("last"))
      .def("segments", &segments_of, py::arg("layer"), py::arg("first"), py::arg("last"));
  m.def("lay_out_by_name", &lay_out_by_name, py::arg("table"), py::arg("experts"), py::arg("types"),
        py::arg("granule"), py::arg("max_padding"));
  m.def("lay_out_groups", &lay_out_groups, py::arg("table"), py::arg("names"), py::arg("group_of"),
        py::arg("types"));
  m.def(
      "strings_of",
      [](const py::bytes& raw, const std::string& key, std::uint32_t most) {
        const std::string_view text = bytes_of(raw);
        const py::gil_scoped_release release;
        std::optional<StringTable> found = read_strings_of(text, key, most);
        return found ? share(*std::move(found)) : nullptr;
      },
      py::arg("text"), py::arg("key"), py::arg("most"));
  m.def("under_stems", &under_stems, py::arg("names"), py::arg("stems"));
  m.def("element_types", [] {
    std::vector<std::pair<std::string, std::uint32_t>> found;
    for (const ElementType& type : element_types()) found.emplace_back(type.name, type.bits);
    return found;
  });
  m.def("dlpack_types", [] {
    py::list found;
    for (const auto& type : dlpack::data_types())
      found.append(type ? py::object(py::make_tuple(type->code, type->bits, type->lanes))
                        : py::none());
    return found;
  });
}

}  // namespace warmserve
