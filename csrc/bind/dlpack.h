// The DLPack ABI (version 1), as its specification lays it out, and views of leased memory as
// capsules of it.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <span>
#include <vector>

#include "memory/vmm.h"

namespace warmserve::dlpack {

enum class DeviceType : std::int32_t { cpu = 1, cuda = 2 };
struct Device {
  DeviceType type;
  std::int32_t id;
};
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct Version {
  std::uint32_t major, minor;
};
struct ManagedTensorVersioned {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensorVersioned* self);
  std::uint64_t flags;
  Tensor tensor;
};
constexpr std::uint64_t kReadOnly = 1, kIsCopied = 2;

// How DLPack names each of element_types(); none for a type that it cannot name.
std::span<const std::optional<DataType>> data_types();

// A tensor at an address of a model. Keeps the address from becoming anything else, not what is
// behind it: that is a lease's business.
struct View {
  ReservationPtr reservation;
  Address address = 0;
  DataType dtype{};
  std::vector<std::int64_t> shape;
  std::uint64_t bytes = 0;
  bool read_only = true;

  // Makes it one of elements of `type`, a number of element_types(). Bytes in one dimension stand
  // for a type that DLPack cannot name and for pairs of elements that the last dimension cuts; with
  // `as_bytes` for every type.
  void set_elements(std::uint8_t type, std::vector<std::int64_t> elements, bool as_bytes);

  Device device() const noexcept;
  // The DLPack protocol. Throws BufferError for what cannot be had, and never TypeError, which
  // consumers take for an old producer and retry. `stream` is not waited for: under a lease every
  // byte has arrived before the host was told.
  pybind11::capsule export_capsule(const pybind11::object& stream,
                                   const pybind11::object& max_version,
                                   const pybind11::object& dl_device,
                                   const pybind11::object& copy) const;
  // Version 3 of the CUDA array interface, for who speaks no DLPack (numba). Throws AttributeError,
  // as hasattr() wants it, on the host and for a dtype that numpy has no name for.
  pybind11::dict cuda_array_interface() const;
};

}  // namespace warmserve::dlpack
