// The DLPack ABI, version 1, as its specification defines it, and views of leased memory that are
// exported as DLPack capsules.
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

// Returns the DLPack type of each of element_types(); nullopt for a type that DLPack does not have.
std::span<const std::optional<DataType>> data_types();

// A tensor at an address of a model. It keeps the address reserved, but not the granules that are
// mapped there; a lease keeps those.
struct View {
  ReservationPtr reservation;
  Address address = 0;
  DataType dtype{};
  std::vector<std::int64_t> shape;
  std::uint64_t bytes = 0;
  bool read_only = true;

  // Sets the dtype and shape for elements of `type`, an index of element_types(). The view becomes
  // one-dimensional bytes if DLPack does not have the type, if the last dimension splits a byte
  // that holds a pair of elements, or with `as_bytes`.
  void set_elements(std::uint8_t type, std::vector<std::int64_t> elements, bool as_bytes);

  Device device() const noexcept;
  // Implements __dlpack__. Throws BufferError for requests that it cannot fulfil. It never throws
  // TypeError, which consumers take as the sign of an old producer, and retry. The view does not
  // synchronize with `stream`, because under a lease all bytes arrived before the host was
  // notified.
  pybind11::capsule export_capsule(const pybind11::object& stream,
                                   const pybind11::object& max_version,
                                   const pybind11::object& dl_device,
                                   const pybind11::object& copy) const;
  // Returns version 3 of the CUDA array interface, for consumers without DLPack (numba). Throws
  // AttributeError, as hasattr() expects, on the host and for a dtype that numpy does not have.
  pybind11::dict cuda_array_interface() const;
};

}  // namespace warmserve::dlpack
