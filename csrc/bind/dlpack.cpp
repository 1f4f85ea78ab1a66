#include "bind/dlpack.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "checkpoint/safetensors_header.h"

namespace py = pybind11;

namespace warmserve::dlpack {
namespace {

constexpr const char* kName = "dltensor_versioned";
constexpr std::uint8_t kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6;
constexpr DataType kByte{kUint, 8, 1};

struct NamedType {
  std::string_view name;
  DataType type;
};
constexpr NamedType kTypes[] = {
    {"BOOL", {kBool, 8, 1}},
    {"U8", kByte},
    {"I8", {kInt, 8, 1}},
    {"U16", {kUint, 16, 1}},
    {"I16", {kInt, 16, 1}},
    {"U32", {kUint, 32, 1}},
    {"I32", {kInt, 32, 1}},
    {"U64", {kUint, 64, 1}},
    {"I64", {kInt, 64, 1}},
    {"F16", {kFloat, 16, 1}},
    {"BF16", {kBfloat, 16, 1}},
    {"F32", {kFloat, 32, 1}},
    {"F64", {kFloat, 64, 1}},
    {"C64", {kComplex, 64, 1}},
    {"F8_E4M3", {10, 8, 1}},
    {"F8_E4M3FNUZ", {11, 8, 1}},
    {"F8_E5M2", {12, 8, 1}},
    {"F8_E5M2FNUZ", {13, 8, 1}},
    {"F8_E8M0", {14, 8, 1}},
    {"F4", {17, 4, 2}},  // two elements per byte: the last dimension counts pairs
};

// The contents of a capsule. Contains no Python objects, because its deleter may run on any thread,
// with or without the GIL, and after the interpreter has been finalized.
struct Owned {
  ManagedTensorVersioned managed{};
  std::vector<std::int64_t> shape, strides;
  ReservationPtr reservation;
  std::unique_ptr<std::byte[]> copy;
};

void delete_owned(ManagedTensorVersioned* managed) {
  delete static_cast<Owned*>(managed->manager_context);
}

// Deletes the contents of a capsule that was not consumed. A consumer renames the capsule.
void delete_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kName)) return;
  auto* managed = static_cast<ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, kName));
  managed->deleter(managed);
}

// Returns numpy's type string; empty if numpy does not have the type.
std::string type_string(const DataType& dtype) {
  constexpr std::string_view kinds = "iuf??c";  // by DLPack's codes, from 0
  if (dtype.code == kBool) return "|b1";
  if (dtype.lanes != 1 || dtype.code >= kinds.size() || kinds[dtype.code] == '?') return {};
  return (dtype.bits == 8 ? "|" : "<") + std::string(1, kinds[dtype.code]) +
         std::to_string(dtype.bits / 8);
}

}  // namespace

std::span<const std::optional<DataType>> data_types() {
  static const std::vector<std::optional<DataType>> types = [] {
    std::vector<std::optional<DataType>> found;
    for (const ElementType& element : element_types()) {
      const auto named = std::find_if(std::begin(kTypes), std::end(kTypes),
                                      [&](const auto& type) { return type.name == element.name; });
      found.push_back(named == std::end(kTypes) ? std::nullopt : std::optional(named->type));
    }
    return found;
  }();
  return types;
}

void View::set_elements(std::uint8_t type, std::vector<std::int64_t> elements, bool as_bytes) {
  const std::optional<DataType> known = data_types()[type];
  as_bytes |= !known;
  if (known && known->lanes > 1) {
    as_bytes |= elements.empty() || elements.back() % known->lanes != 0;
    if (!as_bytes) elements.back() /= known->lanes;
  }
  dtype = as_bytes ? kByte : *known;
  shape = as_bytes ? std::vector{static_cast<std::int64_t>(bytes)} : std::move(elements);
}

Device View::device() const noexcept {
  const int ordinal = reservation->device()->facts().cuda_ordinal;
  return ordinal < 0 ? Device{DeviceType::cpu, 0} : Device{DeviceType::cuda, ordinal};
}

py::capsule View::export_capsule(const py::object& stream, const py::object& max_version,
                                 const py::object& dl_device, const py::object& copy) const {
  static_assert(sizeof(void*) == 8);
  try {
    if (!max_version.is_none() && max_version.cast<std::pair<int, int>>().first < 1)
      throw py::buffer_error("only versioned DLPack capsules are exported");
    if (!dl_device.is_none()) {
      const auto [type, id] = dl_device.cast<std::pair<int, int>>();
      if (type != static_cast<int>(device().type) || id != device().id)
        throw py::buffer_error("the tensor cannot be exported to another device");
    }
    // The protocol disallows 0 as ambiguous; the legacy default stream is 1.
    if (device().type == DeviceType::cuda && !stream.is_none() && stream.cast<std::int64_t>() == 0)
      throw py::buffer_error("stream 0 is ambiguous: 1 is the legacy default stream");
  } catch (const py::cast_error&) {
    throw py::buffer_error(
        "max_version and dl_device must be pairs of integers, stream must be an integer");
  }
  auto owned = std::make_unique<Owned>();
  owned->reservation = reservation;
  owned->shape = shape;
  owned->strides.resize(shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0; stride *= std::max<std::int64_t>(shape[i], 1))
    owned->strides[i] = stride;
  void* data = reinterpret_cast<void*>(address);
  std::uint64_t flags = read_only ? kReadOnly : 0;
  if (!copy.is_none() && copy.cast<bool>()) {
    if (device().type != DeviceType::cpu)
      throw py::buffer_error(
          "copies on the device are not supported: Runtime.read_back copies to the host");
    owned->copy = std::make_unique<std::byte[]>(std::max<std::uint64_t>(bytes, 1));
    std::memcpy(owned->copy.get(), data, bytes);
    data = owned->copy.get();
    flags = kIsCopied;
  }
  owned->managed = {{1, 0},
                    owned.get(),
                    delete_owned,
                    flags,
                    {data, device(), static_cast<std::int32_t>(shape.size()), dtype,
                     owned->shape.data(), owned->strides.data(), 0}};
  py::capsule capsule(&owned->managed, kName, delete_capsule);
  owned.release();
  return capsule;
}

py::dict View::cuda_array_interface() const {
  if (device().type != DeviceType::cuda)
    throw py::attribute_error("host memory has no CUDA array interface");
  const std::string type = type_string(dtype);
  if (type.empty())
    throw py::attribute_error("the CUDA array interface has no name for this dtype: use DLPack");
  py::tuple dimensions(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) dimensions[i] = shape[i];
  using py::literals::operator""_a;
  return py::dict("shape"_a = dimensions, "typestr"_a = type,
                  "data"_a = py::make_tuple(bytes ? address : 0, read_only),
                  "strides"_a = py::none(), "stream"_a = py::none(), "version"_a = 3);
}

}  // namespace warmserve::dlpack
