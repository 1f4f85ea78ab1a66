// The host device: granules are slots of one sparse memfd, mappings are MAP_FIXED mappings of it.
//
// Every slot is writable through one mapping of the whole memfd, the shadow, which no user of the
// device sees. Neither it nor any mapping survives fork (MADV_DONTFORK): a child cannot write its
// parent's weights, nor read them while the parent exchanges what is behind an address.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

#include "driver/driver.h"
#include "driver/host_limits.h"
#include "driver/host_memory.h"
#include "driver/host_streams.h"

namespace warmserve {
namespace {

// Newer than the C library's headers may be.
constexpr int kPopulateRead = 22, kPopulateWrite = 23, kCollapse = 25;
constexpr std::uint64_t kGranularity = 2 * kMiB;

std::byte* pointer(Address address) { return reinterpret_cast<std::byte*>(address); }
Address address_of(const void* memory) { return reinterpret_cast<Address>(memory); }
int no_fork(void* memory, std::uint64_t bytes) { return ::madvise(memory, bytes, MADV_DONTFORK); }

class HostDriver final : public Driver {
 public:
  explicit HostDriver(const HostOptions& options) : options_(options), streams_(options.threads) {
    facts_.name = "host";
    facts_.granularity = kGranularity;
    facts_.threads = options.threads;
    facts_.host_view = options.host_view;
    mapping_limit_ = mapping_limit();
    mapping_baseline_ = mapping_count() + 1024;  // and room for what the process still maps
    capacity_ = ceil_div(total_memory(), kGranularity) * kGranularity;
    memfd_ = ::memfd_create("warmserve-arena", MFD_CLOEXEC);
    if (memfd_ < 0 || ::ftruncate(memfd_, static_cast<off_t>(capacity_)) != 0) return;
    Address shadow = 0;
    if (address_reserve(capacity_, &shadow) != Status::ok) return;
    void* mapped = ::mmap(pointer(shadow), capacity_, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_FIXED | MAP_NORESERVE, memfd_, 0);
    if (mapped != MAP_FAILED && no_fork(mapped, capacity_) == 0)
      shadow_ = static_cast<std::byte*>(mapped);
  }

  ~HostDriver() override {
    if (shadow_) ::munmap(shadow_, capacity_);
    if (memfd_ >= 0) ::close(memfd_);
  }

  bool usable() const { return shadow_ != nullptr; }
  const DeviceFacts& facts() const noexcept override { return facts_; }

  Status memory(std::uint64_t* available, std::uint64_t* total) override {
    *available = available_memory();
    *total = total_memory();
    return Status::ok;
  }

  Status granule_create(std::uint64_t bytes, Handle* out) override {
    if (bytes == 0 || bytes % kGranularity) return Status::invalid;
    std::uint64_t offset = 0;
    {
      const std::lock_guard lock(mutex_);
      const auto reusable = free_slots_.lower_bound({bytes, 0});
      if (reusable != free_slots_.end() && reusable->first == bytes) {
        offset = reusable->second;
        free_slots_.erase(reusable);
      } else if (end_ + bytes <= capacity_) {
        offset = end_;
        end_ += bytes;
      } else {
        return Status::out_of_memory;
      }
    }
    const bool populated = populate(offset, bytes);
    const std::lock_guard lock(mutex_);
    if (!populated) {
      punch(offset, bytes);
      free_slots_.emplace(bytes, offset);
      return Status::out_of_memory;
    }
    slots_[offset + 1] = {bytes};  // the offset names the slot; 0 is no handle
    *out = Handle{offset + 1};
    return Status::ok;
  }

  Status granule_release(Handle handle) override {
    const std::lock_guard lock(mutex_);
    const auto slot = slots_.find(static_cast<std::uint64_t>(handle));
    if (slot == slots_.end() || slot->second.released) return Status::invalid;
    if (slot->second.mappings)
      slot->second.released = true;
    else if (!recycle(slot->first))
      return Status::failed;
    return Status::ok;
  }

  std::byte* host_view(Handle handle) noexcept override {
    return options_.host_view ? shadow_ + offset_of(handle) : nullptr;
  }
  void host_wrote(Handle, std::uint64_t, std::uint64_t) noexcept override {}

  Status address_reserve(std::uint64_t bytes, Address* out) override {
    if (bytes == 0 || bytes % kGranularity) return Status::invalid;
    const std::uint64_t span = bytes + kGranularity;  // trimmed below to an aligned range
    void* memory =
        ::mmap(nullptr, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return Status::out_of_addresses;
    const Address start = address_of(memory);
    const Address aligned = ceil_div(start, kGranularity) * kGranularity;
    if (aligned > start) ::munmap(memory, aligned - start);
    if (start + span > aligned + bytes)
      ::munmap(pointer(aligned + bytes), start + span - aligned - bytes);
    no_fork(pointer(aligned), bytes);
    *out = aligned;
    return Status::ok;
  }

  Status address_free(Address address, std::uint64_t bytes) override {
    return ::munmap(pointer(address), bytes) == 0 ? Status::ok : Status::failed;
  }

  // Neighbours in the memfd become one kernel mapping: a layer of 200 granules is a call or two,
  // and the process stays far from the kernel's limit of mappings.
  Status map(Address address, const Handle* handles, std::size_t count) override {
    const std::lock_guard lock(mutex_);
    std::vector<Run> runs;
    for (std::size_t i = 0; i < count; ++i) {
      const auto slot = slots_.find(static_cast<std::uint64_t>(handles[i]));
      if (slot == slots_.end() || slot->second.released) return Status::invalid;
      const std::uint64_t offset = slot->first - 1;
      if (!runs.empty() && runs.back().offset + runs.back().bytes == offset)
        runs.back().bytes += slot->second.bytes;
      else
        runs.push_back({offset, slot->second.bytes});
    }
    // At the limit even replacing a mapping fails, so unmap could: each run is counted with the
    // hole beside it, and the last tenth is never used.
    if (mapping_baseline_ + 2 * (runs_mapped_ + runs.size()) > mapping_limit_ / 10 * 9)
      return Status::out_of_mappings;
    Address end = address;
    for (const Run& run : runs) {
      void* mapped = ::mmap(pointer(end), run.bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, memfd_,
                            static_cast<off_t>(run.offset));
      if (mapped == MAP_FAILED || no_fork(mapped, run.bytes) != 0) {
        const Status status = errno == ENOMEM ? Status::out_of_mappings : Status::failed;
        hide(address, end + run.bytes - address);
        return status;
      }
      end += run.bytes;
    }
    mapped_[address] = {runs.size(), {handles, handles + count}};
    for (std::size_t i = 0; i < count; ++i)
      ++slots_[static_cast<std::uint64_t>(handles[i])].mappings;
    runs_mapped_ += runs.size();
    return Status::ok;
  }

  Status unmap(Address address, std::uint64_t bytes) override {
    const std::lock_guard lock(mutex_);
    if (!hide(address, bytes)) return Status::failed;
    const auto first = mapped_.lower_bound(address), last = mapped_.lower_bound(address + bytes);
    for (auto mapping = first; mapping != last; ++mapping) {
      runs_mapped_ -= mapping->second.runs;
      for (const Handle handle : mapping->second.handles) {
        Slot& slot = slots_[static_cast<std::uint64_t>(handle)];
        if (--slot.mappings == 0 && slot.released) recycle(static_cast<std::uint64_t>(handle));
      }
    }
    mapped_.erase(first, last);
    return Status::ok;
  }

  Status set_access(Address address, std::uint64_t bytes, Access access) override {
    const bool write = access == Access::read_write;
    const int protection = access == Access::none ? PROT_NONE
                           : write                ? PROT_READ | PROT_WRITE
                                                  : PROT_READ;
    if (::mprotect(pointer(address), bytes, protection) != 0)
      return errno == ENOMEM ? Status::out_of_mappings : Status::failed;
    // The first touch should cost no fault. An old kernel that cannot is no error: the pages exist.
    if (access != Access::none)
      ::madvise(pointer(address), bytes, write ? kPopulateWrite : kPopulateRead);
    return Status::ok;
  }

  // Not locked in memory: ordinary users may lock 8 MiB, and no device reads this by itself.
  Status pinned_create(std::uint64_t bytes, std::byte** out) override {
    if (bytes == 0) return Status::invalid;
    *out = allocate_touched(bytes);
    return *out ? Status::ok : Status::out_of_memory;
  }
  Status pinned_release(std::byte* address, std::uint64_t bytes) override {
    return free_touched(address, bytes) ? Status::ok : Status::failed;
  }

  Status stream_create(StreamPriority, StreamId* out) override {
    return streams_.stream_create(out);
  }
  Status stream_destroy(StreamId s) override { return streams_.stream_destroy(s); }
  Status stream_synchronize(StreamId s) override { return streams_.stream_synchronize(s); }
  Status stream_step(StreamId s) override { return streams_.stream_step(s); }
  Status stream_wait_event(StreamId s, EventId e) override {
    return streams_.stream_wait_event(s, e);
  }
  Status event_create(EventId* out) override { return streams_.event_create(out); }
  Status event_destroy(EventId e) override { return streams_.event_destroy(e); }
  Status event_record(EventId e, StreamId s) override { return streams_.event_record(e, s); }
  Status event_query(EventId e) override { return streams_.event_query(e); }
  Status event_wait(EventId e, std::chrono::microseconds timeout) override {
    return streams_.event_wait(e, timeout);
  }
  Status copy_to_device(Address to, const std::byte* from, std::uint64_t bytes,
                        StreamId stream) override {
    return streams_.enqueue(stream, [=] { std::memcpy(pointer(to), from, bytes); });
  }
  Status copy_from_device(std::byte* to, Address from, std::uint64_t bytes,
                          StreamId stream) override {
    return streams_.enqueue(stream, [=] { std::memcpy(to, pointer(from), bytes); });
  }
  Status copy_to_peer(Address to, Address from, std::uint64_t bytes, StreamId stream) override {
    return streams_.enqueue(stream, [=] { std::memcpy(pointer(to), pointer(from), bytes); });
  }
  Status launch(const KernelCall& call, StreamId stream) override {
    if (misuse(call) != Misuse::none) return Status::invalid;
    return streams_.enqueue(stream, [call] { run_on_cpu(call); });
  }

 private:
  struct Run {
    std::uint64_t offset, bytes;
  };
  struct Mapped {
    std::size_t runs;
    std::vector<Handle> handles;
  };
  struct Slot {
    std::uint64_t bytes = 0;
    std::uint32_t mappings = 0;
    bool released = false;  // its memory goes with the last mapping
  };

  static std::uint64_t offset_of(Handle handle) { return static_cast<std::uint64_t>(handle) - 1; }

  // Nothing behind the range, in one step: a reader faults, it never meets another mapping.
  static bool hide(Address address, std::uint64_t bytes) {
    void* hidden = ::mmap(pointer(address), bytes, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (hidden == MAP_FAILED) return false;
    no_fork(hidden, bytes);
    return true;
  }

  bool recycle(std::uint64_t handle) {
    const std::uint64_t bytes = slots_[handle].bytes;
    if (!punch(handle - 1, bytes)) return false;
    free_slots_.emplace(bytes, handle - 1);
    slots_.erase(handle);
    return true;
  }

  bool punch(std::uint64_t offset, std::uint64_t bytes) {
    return ::fallocate(memfd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                       static_cast<off_t>(offset), static_cast<off_t>(bytes)) == 0;
  }

  // Memory for a slot, without a SIGBUS where there is none: as huge pages if the kernel collapses
  // (it wants a page to start from), else as small ones.
  bool populate(std::uint64_t offset, std::uint64_t bytes) {
    std::byte* slot = shadow_ + offset;
    if (options_.huge_pages) {
      bool started = true;
      for (std::uint64_t at = 0; started && at < bytes; at += kGranularity)
        started = ::madvise(slot + at, 4096, kPopulateWrite) == 0;
      if (started && ::madvise(slot, bytes, kCollapse) == 0) return true;
    }
    if (::madvise(slot, bytes, kPopulateWrite) == 0) return true;
    return errno == EINVAL && ::fallocate(memfd_, FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                                          static_cast<off_t>(bytes)) == 0;
  }

  const HostOptions options_;
  DeviceFacts facts_;
  std::uint64_t mapping_limit_ = 0, mapping_baseline_ = 0;
  int memfd_ = -1;
  std::uint64_t capacity_ = 0;  // bytes of the memfd, all sparse
  std::byte* shadow_ = nullptr;

  std::mutex mutex_;  // guards all below. A leaf; held over mapping calls, which share a kernel
                      // lock anyway
  std::uint64_t end_ = 0;                                         // first offset never used
  std::set<std::pair<std::uint64_t, std::uint64_t>> free_slots_;  // bytes, offset
  std::unordered_map<std::uint64_t, Slot> slots_;                 // by handle
  std::map<Address, Mapped> mapped_;
  std::size_t runs_mapped_ = 0;

  HostStreams streams_;  // empty when this goes: every Stream keeps its driver
};

}  // namespace

std::shared_ptr<Driver> make_host_driver(const HostOptions& options) {
  auto driver = std::make_shared<HostDriver>(options);
  return driver->usable() ? driver : nullptr;
}

const char* to_string(Status status) noexcept {
  switch (status) {
    case Status::ok: return "ok";
    case Status::out_of_memory: return "out of memory";
    case Status::out_of_mappings: return "too many mappings (vm.max_map_count)";
    case Status::out_of_addresses: return "out of addresses";
    case Status::invalid: return "invalid call";
    case Status::not_ready: return "not ready";
    case Status::device_lost: return "device lost";
    case Status::failed: return "failed";
  }
  return "unknown";
}

const char* to_string(Primitive primitive) noexcept {
  static constexpr const char* kNames[] = {
#define X(name) #name,
      WARMSERVE_PRIMITIVES(X)
#undef X
  };
  return kNames[static_cast<int>(primitive)];
}

}  // namespace warmserve
