#include "driver/cuda/granules.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace warmserve::cuda {

#define CALL(function, ...) WARMSERVE_CUDA_CALL(context_, function, __VA_ARGS__)

Granules::Granules(Context& context) : context_(context) {
  kind_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  kind_.location = {CU_MEM_LOCATION_TYPE_DEVICE, context_.device()};
  if (context_.attribute(CU_DEVICE_ATTRIBUTE_INTEGRATED) &&
      context_.attribute(CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED))
    kind_.location = {CU_MEM_LOCATION_TYPE_HOST_NUMA,
                      std::max(0, context_.attribute(CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID))};
  // Sharing with other processes and access by a network card cannot be enabled later, so granules
  // are created with both if the device supports them.
  if (context_.attribute(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED))
    kind_.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  if (!integrated() &&
      context_.attribute(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED))
    kind_.allocFlags.gpuDirectRDMACapable = 1;
  std::size_t granularity = 0;
  const CUmemAllocationProp* kind = &kind_;
  if (CALL(cuMemGetAllocationGranularity, &granularity, kind, CU_MEM_ALLOC_GRANULARITY_MINIMUM) !=
      Status::ok)
    throw Error(ErrorKind::general, context_.name() + ": " + context_.detail());
  granularity_ = granularity;
}

Granules::~Granules() { settle(); }

// Creates memory of the best kind that the system grants. The attributes promise features that some
// systems refuse: a container may forbid them, or their resources run out after some granules. A
// feature that is refused is dropped for all later granules, the network card's first.
Status Granules::make(std::uint64_t bytes, CUmemGenericAllocationHandle* out) {
  CUmemAllocationProp kind;
  {
    const std::lock_guard lock(mutex_);
    kind = kind_;
  }
  const CUmemAllocationProp* wanted = &kind;
  for (bool lesser = false;; lesser = true) {
    const Status status = CALL(cuMemCreate, out, bytes, wanted, 0ull);
    if (status == Status::ok && lesser) {
      const std::lock_guard lock(mutex_);
      kind_.allocFlags = kind.allocFlags;
      kind_.requestedHandleTypes = kind.requestedHandleTypes;
    }
    if (status == Status::ok || status == Status::out_of_memory || status == Status::device_lost)
      return status;
    if (kind.allocFlags.gpuDirectRDMACapable)
      kind.allocFlags.gpuDirectRDMACapable = 0;
    else if (kind.requestedHandleTypes != CU_MEM_HANDLE_TYPE_NONE)
      kind.requestedHandleTypes = CU_MEM_HANDLE_TYPE_NONE;
    else
      return status;
  }
}

Status Granules::create(std::uint64_t bytes, Handle* out) {
  settle();
  CUmemGenericAllocationHandle handle = 0;
  Status status = make(bytes, &handle);
  if (status != Status::ok) return status;
  CUdeviceptr view = 0;
  if (integrated()) status = show(handle, bytes, &view);
  if (status != Status::ok) {
    drop(handle);
    return status;
  }
  const std::lock_guard lock(mutex_);
  granules_[handle] = {bytes, view, false};
  *out = Handle{handle};
  return Status::ok;
}

// The view is removed after the granule is released: memory lives as long as it is mapped, so a
// granule whose release is refused stays intact.
Status Granules::release(Handle handle) {
  settle();
  const auto key = static_cast<std::uint64_t>(handle);
  std::unique_lock lock(mutex_);
  auto entry = granules_.extract(key);  // before another thread's granule gets the same handle
  lock.unlock();
  if (!entry) return Status::invalid;
  const Status status = CALL(cuMemRelease, CUmemGenericAllocationHandle{key});
  if (status != Status::ok) {
    lock.lock();
    granules_.insert(std::move(entry));
    return status;
  }
  const Granule& granule = entry.mapped();
  if (granule.view) hide(granule.view, granule.bytes, true);
  return Status::ok;
}

Status Granules::share(Handle handle, SharedGranule* out) {
  const auto key = static_cast<std::uint64_t>(handle);
  {
    const std::lock_guard lock(mutex_);
    const auto found = granules_.find(key);
    if (found == granules_.end() || found->second.imported) return Status::invalid;
  }
  int descriptor = -1;
  void* const written = &descriptor;
  const Status status =
      CALL(cuMemExportToShareableHandle, written, CUmemGenericAllocationHandle{key},
           CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0ull);
  if (status == Status::ok) *out = {descriptor, 0};
  // The handle is valid, so the granule was created when the system refused shareable memory.
  return status == Status::invalid ? Status::failed : status;
}

// If this process has the memory already, the driver may return the handle that it has. Releasing
// one of the two would then be releasing the other.
Status Granules::import(const SharedGranule& shared, std::uint64_t bytes, Handle* out) {
  settle();
  if (shared.offset != 0 || bytes == 0 || bytes % granularity_) return Status::invalid;
  CUmemGenericAllocationHandle handle = 0;
  void* const descriptor = reinterpret_cast<void*>(static_cast<std::intptr_t>(shared.descriptor));
  const Status status = CALL(cuMemImportFromShareableHandle, &handle, descriptor,
                             CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  if (status != Status::ok) return status;
  std::unique_lock lock(mutex_);
  if (granules_.try_emplace(handle, Granule{bytes, 0, true}).second) {
    *out = Handle{handle};
    return Status::ok;
  }
  lock.unlock();
  drop(handle);
  return Status::invalid;
}

std::byte* Granules::host_view(Handle handle) noexcept {
  if (!integrated()) return nullptr;
  const std::lock_guard lock(mutex_);
  const auto found = granules_.find(static_cast<std::uint64_t>(handle));
  return found == granules_.end() ? nullptr : reinterpret_cast<std::byte*>(found->second.view);
}

std::optional<std::uint64_t> Granules::bytes(Handle handle) {
  const std::lock_guard lock(mutex_);
  const auto found = granules_.find(static_cast<std::uint64_t>(handle));
  if (found == granules_.end()) return std::nullopt;
  return found->second.bytes;
}

void Granules::mapped(Address address, std::span<const Handle> handles) {
  const std::lock_guard lock(mutex_);
  for (const Handle handle : handles) {
    const Granule& granule = granules_[static_cast<std::uint64_t>(handle)];
    if (granule.imported) read_only_[address] = granule.bytes;
    address += granule.bytes;
  }
}

void Granules::unmapped(Address address, std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  read_only_.erase(read_only_.lower_bound(address), read_only_.lower_bound(address + bytes));
}

bool Granules::read_only(Address address, std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto first = read_only_.lower_bound(address);
  return first != read_only_.end() && first->first < address + bytes;
}

// Maps a granule at an address of its own for both the CPU and the device.
Status Granules::show(CUmemGenericAllocationHandle handle, std::uint64_t bytes, CUdeviceptr* view) {
  Status status =
      CALL(cuMemAddressReserve, view, bytes, std::size_t{granularity_}, CUdeviceptr{0}, 0ull);
  if (status != Status::ok) return status;
  status = CALL(cuMemMap, *view, bytes, std::size_t{0}, handle, 0ull);
  const bool mapped = status == Status::ok;
  if (mapped) {
    const CUmemAccessDesc both[] = {
        {{CU_MEM_LOCATION_TYPE_DEVICE, context_.device()}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE},
        {kind_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE}};
    status = CALL(cuMemSetAccess, *view, bytes, &both[0], std::size_t{2});
  }
  if (status != Status::ok) hide(*view, bytes, mapped);
  return status;
}

void Granules::hide(CUdeviceptr view, std::uint64_t bytes, bool mapped) {
  if (mapped && CALL(cuMemUnmap, view, bytes) == Status::ok) mapped = false;
  if (!mapped && CALL(cuMemAddressFree, view, bytes) == Status::ok) return;
  const std::lock_guard lock(mutex_);
  kept_views_.push_back({view, bytes, mapped});
}

void Granules::drop(CUmemGenericAllocationHandle handle) {
  if (CALL(cuMemRelease, handle) == Status::ok) return;
  const std::lock_guard lock(mutex_);
  kept_handles_.push_back(handle);
}

// Retries the releases that were refused before.
void Granules::settle() {
  std::vector<Hidden> views;
  std::vector<CUmemGenericAllocationHandle> handles;
  {
    const std::lock_guard lock(mutex_);
    views.swap(kept_views_);
    handles.swap(kept_handles_);
  }
  for (const Hidden& hidden : views) hide(hidden.view, hidden.bytes, hidden.mapped);
  for (const CUmemGenericAllocationHandle handle : handles) drop(handle);
}

}  // namespace warmserve::cuda
