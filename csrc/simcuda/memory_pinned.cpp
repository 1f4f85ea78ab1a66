// Memory of the host that the program pins: registered ranges and their pages.
#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <string>

#include "simcuda/memory.h"

namespace warmserve::simcuda {
namespace {

struct Pages {
  Address begin;
  std::uint64_t bytes;
};
Pages pages_of(Address address, std::uint64_t bytes) {
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const Address begin = address / page * page;
  return {begin, ceil_div(address + bytes, page) * page - begin};
}

bool populate_pages(Address begin, std::uint64_t length, bool writable) {
  constexpr int kPopulateRead = 22, kPopulateWrite = 23;
  return ::madvise(reinterpret_cast<void*>(begin), length,
                   writable ? kPopulateWrite : kPopulateRead) == 0;
}

// Returns whether the kernel supports MADV_POPULATE. Kernels before 5.14 refuse every such request,
// with the error that newer kernels return if the access is missing.
bool kernel_populates() {
  static const bool can = [] {
    static std::byte here;
    const auto [begin, length] = pages_of(reinterpret_cast<Address>(&here), 1);
    return populate_pages(begin, length, true);
  }();
  return can;
}

// Returns whether the whole range is mapped with that access, according to /proc/self/maps.
bool listed(Address begin, std::uint64_t length, bool writable) {
  std::ifstream maps("/proc/self/maps");
  Address covered = begin;
  for (std::string line; covered < begin + length && std::getline(maps, line);) {
    Address first = 0, last = 0;
    char access[5] = "";
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s", &first, &last, access) != 3)
      return false;
    if (last <= covered) continue;
    if (first > covered || access[0] != 'r' || (writable && access[1] != 'w')) return false;
    covered = last;
  }
  return covered >= begin + length;
}

}  // namespace

CUresult Memory::pin_host(Address address, std::uint64_t bytes, Pinned** out) {
  const auto next = pinned_.lower_bound(address);
  if (next != pinned_.end() && next->first - address < bytes)
    return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  if (pinned_at(address)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  auto pinned = std::make_unique<Pinned>(address, bytes, ceil_div(bytes, granularity_));
  *out = pinned.get();
  pinned_[address] = std::move(pinned);
  return CUDA_SUCCESS;
}

bool Memory::can_pin(Address address, std::uint64_t bytes, bool writable) {
  const auto [begin, length] = pages_of(address, bytes);
  return kernel_populates() ? populate_pages(begin, length, writable)
                            : listed(begin, length, writable);
}

void Memory::keep_pages(Pinned* pinned) {
  const auto [begin, length] = pages_of(pinned->begin, pinned->bytes);
  // Fails for a private mapping, which cannot be duplicated.
  void* const again = ::mremap(reinterpret_cast<void*>(begin), 0, length, MREMAP_MAYMOVE);
  if (again != MAP_FAILED) pinned->pages = static_cast<std::byte*>(again);
}

std::byte* Memory::reach(const Pinned& pinned, Address address, std::uint64_t bytes) const {
  const auto [begin, length] = pages_of(address, bytes);
  // Without kernel support, assume that the pages are mapped: to read /proc/self/maps at every copy
  // would be too slow.
  if (pinned.allocated || !kernel_populates() || populate_pages(begin, length, false))
    return reinterpret_cast<std::byte*>(address);
  if (!pinned.pages) return nullptr;
  return pinned.pages + (address - pages_of(pinned.begin, pinned.bytes).begin);
}

void Memory::unpin_host(Pinned* pinned) {
  if (pinned->allocated) ::munmap(reinterpret_cast<void*>(pinned->begin), pinned->bytes);
  if (pinned->pages) ::munmap(pinned->pages, pages_of(pinned->begin, pinned->bytes).bytes);
  pinned_.erase(pinned->begin);
}

Pinned* Memory::pinned_at(Address address) {
  const auto next = pinned_.upper_bound(address);
  if (next == pinned_.begin()) return nullptr;
  Pinned* const found = std::prev(next)->second.get();
  return address - found->begin < found->bytes ? found : nullptr;
}

}  // namespace warmserve::simcuda
