#include "driver/host_memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/os_failure.h"
#include "base/types.h"
#include "driver/host_limits.h"

namespace warmserve {
namespace {

constexpr int kPopulateWrite = 23;  // the C library's headers may be too old for it
constexpr std::uint64_t kPerThread = 64 * kMiB;
constexpr std::uint64_t kMostThreads = 8;

// Commits the memory. Old kernels do not know the request (EINVAL): there the first use commits it.
bool touch(std::byte* memory, std::uint64_t bytes) noexcept {
  return ::madvise(memory, bytes, kPopulateWrite) == 0 || errno == EINVAL;
}

// Asks for pages of one NUMA node; copies to a device from another node are slower. The request is
// a preference, and we ignore its failure: a container may forbid the call or the node.
void prefer_node(std::byte* memory, std::uint64_t bytes, int node) noexcept {
  constexpr int kMostNodes = 1024, kBits = 8 * sizeof(unsigned long);
  if (node < 0 || node >= kMostNodes) return;
  unsigned long nodes[kMostNodes / kBits] = {};
  nodes[node / kBits] = 1ul << (node % kBits);
  ::syscall(SYS_mbind, memory, bytes, MPOL_PREFERRED, nodes, kMostNodes + 1, 0);
}

}  // namespace

std::byte* reserve_aligned(std::uint64_t bytes, std::uint64_t alignment) noexcept {
  if (bytes > kMostBytes) {
    errno = ENOMEM;
    return nullptr;
  }
  const std::uint64_t span = bytes + alignment;  // trimmed below
  void* memory =
      ::mmap(nullptr, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  const auto start = reinterpret_cast<std::uint64_t>(memory);
  const std::uint64_t before = ceil_div(start, alignment) * alignment - start;
  std::byte* aligned = static_cast<std::byte*>(memory) + before;
  if (before) ::munmap(memory, before);
  if (before < alignment) ::munmap(aligned + bytes, alignment - before);
  ::madvise(aligned, bytes, MADV_DONTFORK);
  return aligned;
}

std::byte* allocate_touched(std::uint64_t bytes, int node, std::string* why) {
  const std::uint64_t available = available_memory();
  if (bytes > kMostBytes || available < kKeptForProcess || bytes > available - kKeptForProcess) {
    *why = format_bytes(bytes) + " are needed, but " + format_bytes(available) +
           " are available in the machine and its control groups, of which " +
           format_bytes(kKeptForProcess) + " must stay free";
    return nullptr;
  }
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    *why =
        os_failure("mmap of " + format_bytes(bytes) + " to be pinned", errno, OsLimit::addresses);
    return nullptr;
  }
  auto* memory = static_cast<std::byte*>(mapped);
  ::madvise(memory, bytes, MADV_HUGEPAGE);
  ::madvise(memory, bytes, MADV_DONTFORK);
  prefer_node(memory, bytes, node);
  const std::uint64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const std::uint64_t parts =
      std::clamp<std::uint64_t>(bytes / kPerThread, 1, std::min(cores, kMostThreads));
  const std::uint64_t part = ceil_div(ceil_div(bytes, parts), 2 * kMiB) * 2 * kMiB;
  std::atomic<bool> touched{true};
  std::vector<std::thread> helpers;
  for (std::uint64_t begin = part; begin < bytes; begin += part) {
    const auto work = [&touched, memory, begin, size = std::min(part, bytes - begin)] {
      if (!touch(memory + begin, size)) touched = false;
    };
    try {
      helpers.emplace_back(work);
    } catch (const std::system_error&) {
      work();
    }
  }
  if (!touch(memory, std::min(part, bytes))) touched = false;
  for (std::thread& helper : helpers) helper.join();
  if (touched) return memory;
  ::munmap(memory, bytes);
  *why = "madvise(MADV_POPULATE_WRITE) of " + format_bytes(bytes) + " to be pinned failed";
  return nullptr;
}

bool free_touched(std::byte* memory, std::uint64_t bytes) noexcept {
  return ::munmap(memory, bytes) == 0;
}

}  // namespace warmserve
