// Memory of the simulated devices: reservations, allocations and mappings.
#include "simcuda/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace warmserve::simcuda {
namespace {

void* map_anonymous(std::uint64_t bytes, int protection) {
  void* address =
      ::mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return address == MAP_FAILED ? nullptr : address;
}

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t to) {
  return ceil_div(value, to) * to;
}

}  // namespace

Memory::Memory(const Options& options, std::unique_ptr<Machine> machine)
    : granularity_(options.granularity),
      kept_(options.kept()),
      slot_bytes_(round_up(kept_, 64)),
      capacity_(options.memory),
      one_memory_(options.integrated),
      devices_(options.visible_devices()),
      machine_(std::move(machine)) {
  const std::uint64_t pools =
      std::max(1, options.devices) + (options.host_memory() && !one_memory_ ? 1 : 0);
  store_bytes_ = pools * ceil_div(capacity_, granularity_) * slot_bytes_;
  if (store_bytes_ == 0) return;
  if (!options.host_memory()) {
    store_ = static_cast<std::byte*>(map_anonymous(store_bytes_, PROT_READ | PROT_WRITE));
    return;
  }
  store_file_ = ::memfd_create("simcuda store", MFD_CLOEXEC);
  if (store_file_ < 0 || ::ftruncate(store_file_, static_cast<off_t>(store_bytes_)) != 0) return;
  void* const at =
      ::mmap(nullptr, store_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, store_file_, 0);
  if (at != MAP_FAILED) store_ = static_cast<std::byte*>(at);
}

Memory::~Memory() {
  while (!reservations_.empty()) {
    Reservation& reservation = *reservations_.begin()->second;
    for (Address at = reservation.begin; reservation.mapped > 0; at += granularity_)
      if (Mapping* mapping = mapping_at(at)) unmap(reservation, mapping);
    unreserve(&reservation);
  }
  for (auto& [handle, physical] : handles_) delete physical;
  while (!pinned_.empty()) unpin_host(pinned_.begin()->second.get());
  if (store_) ::munmap(store_, store_bytes_);
  if (store_file_ >= 0) ::close(store_file_);
}

std::uint64_t Memory::available(int device) const {
  const auto pool = static_cast<std::size_t>(device);
  return usable(pool) - std::min(usable(pool), used(pool));
}

// Returns false if the pool has not that many bytes left.
bool Memory::take(std::size_t pool, std::uint64_t bytes) {
  const std::uint64_t most = usable(pool);
  if (machine_ ? !machine_->take(machine_pool(pool), bytes, most)
               : used_[pool] > most || bytes > most - used_[pool])
    return false;
  used_[pool] += bytes;
  return true;
}

CUresult Memory::reserve(std::uint64_t bytes, std::uint64_t alignment, Address hint,
                         Reservation** out) {
  alignment = std::max(alignment, granularity_);
  const std::uint64_t span = round_up(bytes, granularity_);
  if (span < bytes || span + alignment < span) return CUDA_ERROR_OUT_OF_MEMORY;
  Address begin = 0;
  if (hint != 0 && hint % alignment == 0) {
    void* at = ::mmap(reinterpret_cast<void*>(hint), span, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (at != MAP_FAILED && reinterpret_cast<Address>(at) == hint) begin = hint;
    if (at != MAP_FAILED && begin == 0) ::munmap(at, span);
  }
  if (begin == 0) {
    void* raw = map_anonymous(span + alignment, PROT_NONE);
    if (!raw) return CUDA_ERROR_OUT_OF_MEMORY;
    const auto first = reinterpret_cast<Address>(raw);
    begin = round_up(first, alignment);
    if (begin > first) ::munmap(raw, begin - first);
    if (first + alignment > begin)
      ::munmap(reinterpret_cast<void*>(begin + span), first + alignment - begin);
  }
  auto reservation = std::make_unique<Reservation>();
  reservation->begin = begin;
  reservation->bytes = bytes;
  reservation->table_bytes = span / granularity_ * sizeof(Mapping*);
  reservation->pages =
      static_cast<Mapping**>(map_anonymous(reservation->table_bytes, PROT_READ | PROT_WRITE));
  if (!reservation->pages) {
    ::munmap(reinterpret_cast<void*>(begin), span);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *out = last_ = reservation.get();
  reservations_[begin] = std::move(reservation);
  return CUDA_SUCCESS;
}

void Memory::unreserve(Reservation* reservation) {
  ::munmap(reservation->pages, reservation->table_bytes);
  ::munmap(reinterpret_cast<void*>(reservation->begin), round_up(reservation->bytes, granularity_));
  if (last_ == reservation) last_ = nullptr;
  reservations_.erase(reservation->begin);
}

Reservation* Memory::reservation_at(Address address) {
  if (last_ && address - last_->begin < last_->bytes) return last_;
  auto next = reservations_.upper_bound(address);
  if (next == reservations_.begin()) return nullptr;
  Reservation* found = std::prev(next)->second.get();
  if (address - found->begin >= found->bytes) return nullptr;
  return last_ = found;
}

CUresult Memory::create(std::uint64_t bytes, int device, bool host, Physical** out) {
  const std::uint64_t granules = ceil_div(bytes, granularity_);
  const std::size_t pool = pool_of(device, host);
  if (!store_ || granules > capacity_ / granularity_ || !take(pool, granules * granularity_))
    return CUDA_ERROR_OUT_OF_MEMORY;
  auto physical = std::make_unique<Physical>(granules);
  physical->device = device;
  physical->host = host;
  physical->bytes = granules * granularity_;
  physical->slots.reserve(granules);
  while (physical->slots.size() < granules) {
    if (free_slots_.empty()) {
      physical->slots.push_back(next_slot_++);
    } else {
      physical->slots.push_back(free_slots_.back());
      free_slots_.pop_back();
    }
  }
  ++physical_count_;
  *out = physical.release();
  return CUDA_SUCCESS;
}

Physical* Memory::find(std::uint64_t handle) {
  const auto found = handles_.find(handle);
  return found == handles_.end() ? nullptr : found->second;
}

void Memory::give_handle(Physical* physical) {
  if (physical->references++ > 0) return;
  if (physical->handle == 0) physical->handle = new_handle();
  handles_[physical->handle] = physical;
}

void Memory::drop_reference(Physical* physical) {
  if (--physical->references > 0) return;
  handles_.erase(physical->handle);
  forget_if_dead(physical);
}

void Memory::unpin(Physical* physical) {
  --physical->pins;
  forget_if_dead(physical);
}

// Frees an allocation that no handle, mapping or running operation refers to.
void Memory::forget_if_dead(Physical* physical) {
  if (physical->references > 0 || physical->mappings > 0 || physical->pins > 0) return;
  const std::size_t pool = pool_of(physical->device, physical->host);
  used_[pool] -= physical->bytes;
  if (physical->file) {
    shared_.erase(physical->file->identity());
    if (machine_) machine_->let_go(*physical->file);
  } else {
    free_slots(physical);
    if (machine_) machine_->give_back(machine_pool(pool), physical->bytes);
  }
  --physical_count_;
  delete physical;
}

void Memory::free_slots(Physical* physical) {
  free_slots_.insert(free_slots_.end(), physical->slots.rbegin(), physical->slots.rend());
  physical->slots.clear();
}

bool Memory::is_free(const Reservation& reservation, Address address, std::uint64_t bytes) const {
  Mapping** const first = reservation.pages + (address - reservation.begin) / granularity_;
  return std::all_of(first, first + ceil_div(bytes, granularity_),
                     [](const Mapping* mapping) { return mapping == nullptr; });
}

Mapping* Memory::map(Reservation& reservation, Address address, std::uint64_t bytes,
                     Physical* physical) {
  Mapping* mapping = nullptr;
  if (spare_.empty()) {
    mapping = &made_.emplace_back();
  } else {
    mapping = spare_.back();
    spare_.pop_back();
    mapping->access = {};
    mapping->uses.clear();
  }
  mapping->begin = address;
  mapping->bytes = bytes;
  mapping->physical = physical;
  Mapping** const first = reservation.pages + (address - reservation.begin) / granularity_;
  std::fill(first, first + ceil_div(bytes, granularity_), mapping);
  ++reservation.mapped;
  ++physical->mappings;
  ++mapping_count_;
  return mapping;
}

bool Memory::show_to_cpu(const Mapping& mapping, int protection) {
  auto* const begin = reinterpret_cast<std::byte*>(mapping.begin);
  const Physical& physical = *mapping.physical;
  const auto show = [&](std::uint64_t page, std::uint64_t count, int file, std::uint64_t offset) {
    return ::mmap(begin + page * granularity_, count * granularity_, protection,
                  MAP_SHARED | MAP_FIXED, file, static_cast<off_t>(offset)) != MAP_FAILED;
  };
  bool done = true;
  if (physical.file)
    done = show(0, physical.bytes / granularity_, physical.file->descriptor(),
                physical.file->contents_at());
  const std::vector<std::uint32_t>& slots = physical.slots;
  for (std::size_t i = 0, next; i < slots.size() && done; i = next) {
    for (next = i + 1; next < slots.size() && slots[next] == slots[next - 1] + 1; ++next) {
    }
    done = show(i, next - i, store_file_, slots[i] * slot_bytes_);
  }
  // A child of fork() does not inherit the device's mappings.
  if (done) ::madvise(begin, mapping.bytes, MADV_DONTFORK);
  return done;
}

bool Memory::set_cpu_access(Mapping* mapping, CUmemAccess_flags access) {
  if (mapping->cpu_access == access) return true;
  auto* const begin = reinterpret_cast<std::byte*>(mapping->begin);
  const int protection = access == CU_MEM_ACCESS_FLAGS_PROT_READ        ? PROT_READ
                         : access == CU_MEM_ACCESS_FLAGS_PROT_READWRITE ? PROT_READ | PROT_WRITE
                                                                        : PROT_NONE;
  bool done = true;
  if (protection != PROT_NONE && mapping->cpu_access != CU_MEM_ACCESS_FLAGS_PROT_NONE) {
    done = ::mprotect(begin, mapping->bytes, protection) == 0;
  } else if (protection != PROT_NONE) {
    done = show_to_cpu(*mapping, protection);
  }
  if (protection == PROT_NONE || !done)
    ::mmap(begin, mapping->bytes, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  mapping->cpu_access = done ? static_cast<std::uint8_t>(access) : 0;
  return done;
}

void Memory::unmap(Reservation& reservation, Mapping* mapping) {
  set_cpu_access(mapping, CU_MEM_ACCESS_FLAGS_PROT_NONE);
  Mapping** const first = reservation.pages + (mapping->begin - reservation.begin) / granularity_;
  std::fill(first, first + ceil_div(mapping->bytes, granularity_), nullptr);
  --reservation.mapped;
  --mapping_count_;
  Physical* const physical = mapping->physical;
  spare_.push_back(mapping);
  --physical->mappings;
  forget_if_dead(physical);
}

Mapping* Memory::mapping_at(Address address) {
  const Reservation* const reservation = reservation_at(address);
  if (!reservation) return nullptr;
  Mapping* const mapping = reservation->pages[(address - reservation->begin) / granularity_];
  return mapping && address < mapping->end() ? mapping : nullptr;
}

const std::vector<Mapping*>& Memory::whole(Address address, std::uint64_t bytes) {
  range_.clear();
  const Reservation* const reservation = reservation_at(address);
  if (!reservation || bytes == 0 || reservation->begin + reservation->bytes - address < bytes)
    return range_;
  for (Address at = address; at < address + bytes;) {
    Mapping* const mapping = reservation->pages[(at - reservation->begin) / granularity_];
    if (!mapping || mapping->begin != at || mapping->end() > address + bytes) {
      range_.clear();
      break;
    }
    range_.push_back(mapping);
    at = mapping->end();
  }
  return range_;
}

bool Memory::walk(Address address, std::uint64_t bytes, std::vector<Piece>* out) {
  for (Address at = address; at < address + bytes;) {
    Mapping* const mapping = mapping_at(at);
    if (!mapping) return false;
    const Address last = std::min(address + bytes, mapping->end());
    while (at < last) {
      const std::uint64_t offset = at - mapping->begin, page = offset / granularity_;
      const std::uint64_t begin = offset % granularity_;
      const std::uint64_t end = std::min(granularity_, begin + (last - at));
      out->push_back(
          {mapping, page, static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(end)});
      at += end - begin;
    }
  }
  return true;
}

void Memory::free_plain(Reservation* reservation) {
  if (Mapping* const mapping = mapping_at(reservation->begin)) unmap(*reservation, mapping);
  unreserve(reservation);
}

void Memory::free_all_of(CUcontext context) {
  std::vector<Reservation*> plain;
  for (const auto& [begin, reservation] : reservations_)
    if (reservation->plain && reservation->context == context) plain.push_back(reservation.get());
  for (Reservation* const reservation : plain) free_plain(reservation);
  std::vector<Pinned*> pinned;
  for (const auto& [begin, region] : pinned_)
    if (region->context == context) pinned.push_back(region.get());
  for (Pinned* const region : pinned) unpin_host(region);
}

Place Memory::place(Address address, std::uint64_t bytes) {
  if (address + bytes < address) return Place::broken;
  if (reservation_at(address)) return Place::device;
  if (const Pinned* const pinned = pinned_at(address))
    return address + bytes <= pinned->begin + pinned->bytes ? Place::pinned : Place::broken;
  const auto next = pinned_.upper_bound(address);
  if (next != pinned_.end() && next->first < address + bytes) return Place::broken;
  const auto reserved = reservations_.upper_bound(address);
  if (reserved != reservations_.end() && reserved->first < address + bytes) return Place::broken;
  return Place::pageable;
}

std::size_t Memory::count_reservations(bool plain) const {
  return std::count_if(reservations_.begin(), reservations_.end(),
                       [&](const auto& entry) { return entry.second->plain == plain; });
}

std::size_t Memory::count_pinned(bool allocated) const {
  return std::count_if(pinned_.begin(), pinned_.end(),
                       [&](const auto& entry) { return entry.second->allocated == allocated; });
}

}  // namespace warmserve::simcuda
