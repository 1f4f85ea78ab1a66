// Allocations that several processes share.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "simcuda/memory.h"

namespace warmserve::simcuda {

namespace {

// Leaves the pages of zeros out, which would otherwise take memory in the new file.
void copy_pages(std::byte* to, const std::byte* from, std::uint64_t bytes) {
  static constexpr std::byte kZeros[4096]{};
  for (std::uint64_t at = 0; at < bytes; at += sizeof kZeros) {
    const std::uint64_t here = std::min<std::uint64_t>(sizeof kZeros, bytes - at);
    if (std::memcmp(from + at, kZeros, here) != 0) std::memcpy(to + at, from + at, here);
  }
}

}  // namespace

CUresult Memory::share(Physical* physical) {
  if (physical->file) return CUDA_SUCCESS;
  const int device = devices_[static_cast<std::size_t>(physical->device)];
  auto file = SharedFile::make(
      {physical->bytes, granularity_, slot_bytes_, device, physical->host, physical->prop});
  if (!file) return CUDA_ERROR_OPERATING_SYSTEM;
  const std::size_t pool = machine_pool(pool_of(physical->device, physical->host));
  if (machine_ && !machine_->hold(*file, pool, true)) return CUDA_ERROR_OUT_OF_MEMORY;
  for (std::uint64_t page = 0; page < physical->slots.size(); ++page)
    copy_pages(file->contents() + page * slot_bytes_, slot(*physical, page), slot_bytes_);
  physical->file = std::move(file);
  physical->shadow.share(physical->file.get());
  shared_[physical->file->identity()] = physical;
  free_slots(physical);
  for (const Mapping& mapping : made_)
    if (mapping.physical == physical && mapping.cpu_access != CU_MEM_ACCESS_FLAGS_PROT_NONE)
      show_to_cpu(mapping, mapping.cpu_access == CU_MEM_ACCESS_FLAGS_PROT_READ
                               ? PROT_READ
                               : PROT_READ | PROT_WRITE);
  return CUDA_SUCCESS;
}

CUresult Memory::import(int descriptor, Physical** out) {
  auto file = SharedFile::open(descriptor);
  if (!file) return CUDA_ERROR_INVALID_VALUE;
  if (const auto known = shared_.find(file->identity()); known != shared_.end()) {
    *out = known->second;
    return CUDA_SUCCESS;
  }
  const SharedFacts facts = file->facts();
  const auto device = std::find(devices_.begin(), devices_.end(), facts.device);
  if (facts.granularity != granularity_ || facts.kept != slot_bytes_ || device == devices_.end() ||
      (facts.host && store_file_ < 0))
    return CUDA_ERROR_INVALID_VALUE;
  auto physical = std::make_unique<Physical>(facts.bytes / granularity_);
  physical->device = static_cast<int>(device - devices_.begin());
  physical->host = facts.host;
  physical->bytes = facts.bytes;
  physical->prop = facts.prop;
  if (!facts.host) physical->prop.location.id = physical->device;
  const std::size_t pool = pool_of(physical->device, facts.host);
  if (machine_ && !machine_->hold(*file, machine_pool(pool), false))
    return CUDA_ERROR_OUT_OF_MEMORY;
  used_[pool] += facts.bytes;
  ++physical_count_;
  physical->shadow.share(file.get());
  shared_[file->identity()] = physical.get();
  physical->file = std::move(file);
  *out = physical.release();
  return CUDA_SUCCESS;
}

}  // namespace warmserve::simcuda
