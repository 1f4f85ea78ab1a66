// The host device: granules are slots of one sparse memfd, mappings are MAP_FIXED mappings of it.
// Imported granules are parts of other processes' memfds.
//
// A forked child inherits no mapping (MADV_DONTFORK), so it can neither write its parent's weights
// nor read them while the parent changes the mappings. The driver refuses a call that breaks its
// contract, because mmap would overwrite existing mappings.
#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/os_failure.h"
#include "driver/driver.h"
#include "driver/host/addresses.h"
#include "driver/host/copies.h"
#include "driver/host/imports.h"
#include "driver/host/slots.h"
#include "driver/host/streams.h"
#include "driver/host_limits.h"
#include "driver/host_memory.h"

namespace warmserve {
namespace {

// The C library's headers may be too old for these.
constexpr int kPopulateRead = 22, kPopulateWrite = 23;
constexpr std::uint64_t kGranularity = HostSlots::kGranularity;

// The handle of a granule is its offset in the arena's memfd plus 1, because 0 is Handle::none.
// Imported granules have this bit and a number.
constexpr std::uint64_t kImported = 1ull << 63;

std::byte* pointer(Address address) { return reinterpret_cast<std::byte*>(address); }
Address address_of(const void* memory) { return reinterpret_cast<Address>(memory); }
int no_fork(void* memory, std::uint64_t bytes) { return ::madvise(memory, bytes, MADV_DONTFORK); }

// The reason why a primitive failed last on this thread.
thread_local std::string last_detail;

Status refuse(Status status, std::string detail) {
  last_detail = std::move(detail);
  return status;
}

class HostDriver final : public Driver {
 public:
  explicit HostDriver(const HostOptions& options)
      : options_(options),
        slots_(options.huge_pages, options.root, options.memory),
        addresses_(kGranularity),
        streams_(options.threads) {
    facts_.name = "host";
    facts_.granularity = kGranularity;
    facts_.threads = options.threads;
    facts_.host_view = options.host_view;
    facts_.contents = options.contents;
    mapping_limit_ = mapping_limit();
    mapping_baseline_ = mapping_count() + 1024;  // room for later mappings of the process
  }

  const DeviceFacts& facts() const noexcept override { return facts_; }
  std::string detail() const override { return std::exchange(last_detail, {}); }

  Status memory(std::uint64_t* available, std::uint64_t* total) override {
    *available = slots_.available();
    *total = total_memory();
    return Status::ok;
  }

  Status granule_create(std::uint64_t bytes, Handle* out) override {
    if (bytes == 0 || bytes % kGranularity || bytes > kMostBytes)
      return refuse(Status::invalid, format_bytes(bytes) + " are not a positive multiple of 2 MiB");
    std::uint64_t offset = 0;
    std::string why;
    if (const Status status = slots_.create(bytes, &offset, &why); status != Status::ok)
      return refuse(status, why);
    const std::lock_guard lock(mutex_);
    granules_[offset + 1] = {bytes, offset, slots_.descriptor(), slots_.view(offset)};
    *out = Handle{offset + 1};
    return Status::ok;
  }

  Status granule_release(Handle handle) override {
    const std::lock_guard lock(mutex_);
    const auto granule = find(handle);
    if (granule == granules_.end())
      return refuse(Status::invalid, "the granule is not a granule of this device");
    if (granule->second.mappings)
      granule->second.released = true;
    else if (!recycle(granule))
      return refuse(Status::failed, os_failure("fallocate of a hole in the arena's memfd", errno));
    return Status::ok;
  }

  Status granule_export(Handle handle, SharedGranule* out) override {
    const std::lock_guard lock(mutex_);
    const auto granule = find(handle);
    if (granule == granules_.end() || granule->second.imported())
      return refuse(Status::invalid, "only a granule that this device created can be exported");
    const int descriptor = slots_.read_only_descriptor();
    if (descriptor < 0)
      return refuse(Status::failed, os_failure("open of the arena's memfd, read-only", errno,
                                               OsLimit::descriptors));
    *out = {descriptor, granule->second.offset};
    granule->second.exported = true;
    return Status::ok;
  }

  Status granule_import(const SharedGranule& shared, std::uint64_t bytes, Handle* out) override {
    const std::lock_guard lock(mutex_);
    int file = -1;
    std::string why;
    if (const Status status = imports_.add(shared, bytes, kGranularity, &file, &why);
        status != Status::ok)
      return refuse(status, why);
    const std::uint64_t handle = kImported | ++imported_;
    granules_[handle] = {bytes, shared.offset, file, nullptr};
    *out = Handle{handle};
    return Status::ok;
  }

  std::byte* host_view(Handle handle) noexcept override {
    if (!options_.host_view) return nullptr;
    const std::lock_guard lock(mutex_);
    const auto granule = find(handle);
    return granule == granules_.end() ? nullptr : granule->second.view;
  }
  void host_wrote(Handle, std::uint64_t, std::uint64_t) noexcept override {}

  Status address_reserve(std::uint64_t bytes, Address* out) override {
    if (bytes == 0 || bytes % kGranularity)
      return refuse(Status::invalid, format_bytes(bytes) + " are not a positive multiple of 2 MiB");
    std::byte* memory = reserve_aligned(bytes, kGranularity);
    if (!memory)
      return refuse(Status::out_of_addresses,
                    os_failure("mmap of " + format_bytes(bytes) + " of addresses", errno,
                               OsLimit::addresses));
    *out = address_of(memory);
    const std::lock_guard lock(mutex_);
    addresses_.reserve(*out, bytes);
    return Status::ok;
  }

  Status address_free(Address address, std::uint64_t bytes) override {
    const std::lock_guard lock(mutex_);
    if (!addresses_.can_free(address, bytes))
      return refuse(Status::invalid, "the range is not a reservation, or it has mappings");
    if (::munmap(pointer(address), bytes) != 0)
      return refuse(Status::failed, os_failure("munmap of a reservation", errno));
    addresses_.free(address);
    return Status::ok;
  }

  // Granules that are adjacent in their file become one kernel mapping. A layer of 200 granules
  // then takes one or two mmap calls, and the process stays far below the limit of mappings.
  Status map(Address address, const Handle* handles, std::size_t count) override {
    const std::lock_guard lock(mutex_);
    std::vector<HostAddresses::Mapped> mapped;
    std::vector<Run> runs;
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const auto granule = find(handles[i]);
      if (granule == granules_.end() || granule->second.bytes > kMostBytes - total)
        return refuse(Status::invalid, "a granule to map is not a granule of this device");
      const std::uint64_t offset = granule->second.offset, bytes = granule->second.bytes;
      const int file = granule->second.file;
      const bool begins = runs.empty() || runs.back().file != file ||
                          runs.back().offset + runs.back().bytes != offset;
      if (begins) runs.push_back({file, offset, 0});
      runs.back().bytes += bytes;
      mapped.push_back({handles[i], bytes, begins});
      total += bytes;
    }
    if (!addresses_.can_map(address, total))
      return refuse(Status::invalid,
                    "the range is not aligned, not inside one reservation, or already mapped");
    // At the kernel's limit even replacing a mapping fails, so unmap could fail. Therefore each run
    // counts twice, for itself and the hole beside it, and a tenth of the limit stays unused.
    if (mapping_baseline_ + slots_.mappings() + 2 * (addresses_.runs() + runs.size()) >
        mapping_limit_ / 10 * 9)
      return refuse(Status::out_of_mappings,
                    os_failure("mmap of granules", ENOMEM, OsLimit::addresses));
    Address end = address;
    for (const Run& run : runs) {
      void* at = ::mmap(pointer(end), run.bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, run.file,
                        static_cast<off_t>(run.offset));
      if (at == MAP_FAILED || no_fork(at, run.bytes) != 0) {
        const int error = errno;
        hide(address, end + run.bytes - address);
        return refuse(error == ENOMEM ? Status::out_of_mappings : Status::failed,
                      os_failure("mmap of granules", error, OsLimit::addresses));
      }
      end += run.bytes;
    }
    addresses_.map(address, mapped);
    for (std::size_t i = 0; i < count; ++i) ++find(handles[i])->second.mappings;
    return Status::ok;
  }

  Status unmap(Address address, std::uint64_t bytes) override {
    const std::lock_guard lock(mutex_);
    const auto range = addresses_.whole(address, bytes);
    if (!range) return refuse(Status::invalid, "the range does not consist of whole mappings");
    if (!hide(address, bytes))
      return refuse(Status::failed,
                    os_failure("mmap over granules to unmap", errno, OsLimit::addresses));
    for (auto mapping = range->first; mapping != range->second; ++mapping) {
      const auto granule = granule_of(mapping->second.granule);
      if (--granule->second.mappings == 0 && granule->second.released) recycle(granule);
    }
    addresses_.unmap(*range);
    return Status::ok;
  }

  Status set_access(Address address, std::uint64_t bytes, Access access) override {
    const bool write = access == Access::read_write;
    {
      const std::lock_guard lock(mutex_);
      const auto range = addresses_.whole(address, bytes);
      if (!range) return refuse(Status::invalid, "the range does not consist of whole mappings");
      for (auto mapping = range->first; write && mapping != range->second; ++mapping)
        if (granule_of(mapping->second.granule)->second.imported())
          return refuse(Status::invalid, "a granule of another process can only be read");
    }
    const int protection = access == Access::none ? PROT_NONE
                           : write                ? PROT_READ | PROT_WRITE
                                                  : PROT_READ;
    if (::mprotect(pointer(address), bytes, protection) != 0) {
      const int error = errno;
      return refuse(error == ENOMEM ? Status::out_of_mappings : Status::failed,
                    os_failure("mprotect of granules", error, OsLimit::addresses));
    }
    // Avoids page faults on first use. Old kernels cannot do this; that is not an error, because
    // the pages exist.
    if (access != Access::none)
      ::madvise(pointer(address), bytes, write ? kPopulateWrite : kPopulateRead);
    return Status::ok;
  }

  // Does not mlock the memory: ordinary users may lock only 8 MiB, and no device reads it by DMA.
  Status pinned_create(std::uint64_t bytes, std::byte** out) override {
    if (bytes == 0) return refuse(Status::invalid, "cannot pin 0 bytes");
    std::string why;
    std::byte* memory = allocate_touched(bytes, kAnyNode, &why);
    if (!memory) return refuse(Status::out_of_memory, why);
    const std::lock_guard lock(mutex_);
    pinned_[memory] = bytes;
    *out = memory;
    return Status::ok;
  }
  Status pinned_release(std::byte* address, std::uint64_t bytes) override {
    const std::lock_guard lock(mutex_);
    const auto found = pinned_.find(address);
    if (found == pinned_.end() || found->second != bytes)
      return refuse(Status::invalid, "the range is not a pinned region");
    if (!free_touched(address, bytes))
      return refuse(Status::failed, os_failure("munmap of a pinned region", errno));
    pinned_.erase(found);
    return Status::ok;
  }

  Status stream_create(StreamPriority, StreamId* out) override {
    std::string why;
    const Status status = streams_.stream_create(out, &why);
    return status == Status::ok ? status : refuse(status, why);
  }
  Status stream_destroy(StreamId s) override { return streams_.stream_destroy(s); }
  Status stream_synchronize(StreamId s) override { return streams_.stream_synchronize(s); }
  Status stream_step(StreamId s) override { return streams_.stream_step(s); }
  Status stream_capturing(StreamId, bool* out) override {
    *out = false;
    return Status::ok;
  }
  Status device_synchronize() override { return streams_.synchronize_all(); }
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
    return streams_.enqueue(stream, [=] { copy_past_caches(pointer(to), from, bytes); });
  }
  Status copy_from_device(std::byte* to, Address from, std::uint64_t bytes,
                          StreamId stream) override {
    return streams_.enqueue(stream, [=] { std::memcpy(to, pointer(from), bytes); });
  }
  Status copy_to_peer(Address to, Address from, std::uint64_t bytes, StreamId stream) override {
    return streams_.enqueue(stream, [=] { copy_past_caches(pointer(to), pointer(from), bytes); });
  }
  Status fill_zero(Address to, std::uint64_t bytes, StreamId stream) override {
    return streams_.enqueue(stream, [=] { std::memset(pointer(to), 0, bytes); });
  }
  Status launch(const KernelCall& call, StreamId stream) override {
    if (misuse(call) != Misuse::none) return Status::invalid;
    return streams_.enqueue(stream, [call] { run_on_cpu(call); });
  }

 private:
  struct Run {
    int file;
    std::uint64_t offset, bytes;
  };
  struct Granule {
    std::uint64_t bytes = 0;
    std::uint64_t offset = 0;   // in its file
    int file = -1;              // a descriptor
    std::byte* view = nullptr;  // null if imported
    std::uint64_t mappings = 0;
    bool released = false;  // its memory is freed with the last mapping
    bool exported = false;  // other processes may read it until all have closed the memfd

    bool imported() const { return !view; }
  };
  using Granules = std::unordered_map<std::uint64_t, Granule>;

  Granules::iterator granule_of(Handle handle) {
    return granules_.find(static_cast<std::uint64_t>(handle));
  }
  // Finds a usable granule. A released granule is not usable, although it may still be mapped.
  Granules::iterator find(Handle handle) {
    const auto found = granule_of(handle);
    return found != granules_.end() && found->second.released ? granules_.end() : found;
  }

  // Replaces the range's mappings by PROT_NONE in one step, so that a reader faults and never sees
  // another mapping.
  static bool hide(Address address, std::uint64_t bytes) {
    void* hidden = ::mmap(pointer(address), bytes, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (hidden == MAP_FAILED) return false;
    no_fork(hidden, bytes);
    return true;
  }

  bool recycle(Granules::iterator granule) {
    const Granule& gone = granule->second;
    if (gone.imported())
      imports_.remove(gone.file);
    else if (!gone.exported && !slots_.recycle(gone.offset, gone.bytes))
      return false;
    granules_.erase(granule);
    return true;
  }

  const HostOptions options_;
  DeviceFacts facts_;
  std::uint64_t mapping_limit_ = 0, mapping_baseline_ = 0;
  HostSlots slots_;  // has its own lock, a leaf

  std::mutex mutex_;   // guards all below; held over mmap calls, which share a kernel lock anyway
  Granules granules_;  // by handle
  HostImports imports_;
  std::uint64_t imported_ = 0;  // granules imported so far
  HostAddresses addresses_;
  std::map<const std::byte*, std::uint64_t> pinned_;  // bytes by address

  HostStreams streams_;  // empty on destruction: every Stream keeps its driver alive
};

}  // namespace

std::shared_ptr<Driver> make_host_driver(const HostOptions& options) {
  return std::make_shared<HostDriver>(options);
}

}  // namespace warmserve
