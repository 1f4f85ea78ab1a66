#include "bind/dlpack.h"

#include <cstring>
#include <memory>

namespace py = pybind11;

namespace warmserve::dlpack {
namespace {

constexpr const char* kName = "dltensor_versioned";

// What a capsule owns. Its deleter may run on any thread, with or without the GIL, and after the
// interpreter is gone: there is nothing of Python in it.
struct Owned {
  ManagedTensorVersioned managed{};
  std::vector<std::int64_t> shape, strides;
  ReservationPtr reservation;
  std::unique_ptr<std::byte[]> copy;
};

void delete_owned(ManagedTensorVersioned* managed) {
  delete static_cast<Owned*>(managed->manager_context);
}

// An unconsumed capsule still has its first name.
void delete_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kName)) return;
  auto* managed = static_cast<ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, kName));
  managed->deleter(managed);
}

}  // namespace

py::capsule View::export_capsule(const py::object&, const py::object& max_version,
                                 const py::object& dl_device, const py::object& copy) const {
  static_assert(sizeof(void*) == 8);
  try {
    if (!max_version.is_none() && max_version.cast<std::pair<int, int>>().first < 1)
      throw py::buffer_error("only versioned DLPack capsules are exported");
    if (!dl_device.is_none()) {
      const auto [type, id] = dl_device.cast<std::pair<int, int>>();
      if (type != static_cast<int>(DeviceType::cpu) || id != 0)
        throw py::buffer_error("the tensor is in host memory and is not moved");
    }
  } catch (const py::cast_error&) {
    throw py::buffer_error("max_version and dl_device are pairs of integers");
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
    owned->copy = std::make_unique<std::byte[]>(std::max<std::uint64_t>(bytes, 1));
    std::memcpy(owned->copy.get(), data, bytes);
    data = owned->copy.get();
    flags = kIsCopied;
  }
  owned->managed = {{1, 0},
                    owned.get(),
                    delete_owned,
                    flags,
                    {data,
                     {DeviceType::cpu, 0},
                     static_cast<std::int32_t>(shape.size()),
                     dtype,
                     owned->shape.data(),
                     owned->strides.data(),
                     0}};
  py::capsule capsule(&owned->managed, kName, delete_capsule);
  owned.release();
  return capsule;
}

}  // namespace warmserve::dlpack
