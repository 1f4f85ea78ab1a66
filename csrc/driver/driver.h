// Everything this library asks of a device, as one table of primitives.
//
// A driver obeys, and its caller may rely on nothing but, the contracts below; they are CUDA's,
// the strictest of all devices. Primitives return a Status and never throw; 0 is success, and a
// primitive that fails has changed nothing. "Blocks" is said where a primitive may wait for work
// on the device or take longer than a few microseconds per granule; all others return at once.
// Any thread may call any primitive; what one thread does to an object while another destroys it
// is the caller's to prevent.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/types.h"
#include "kernels/kernels.h"

namespace warmserve {

enum class Status : int {
  ok = 0,
  out_of_memory,    // no physical memory for a granule or a pinned region
  out_of_mappings,  // the operating system's limit of mappings is near
  out_of_addresses,
  invalid,      // the call breaks its contract
  not_ready,    // a query or a timed wait: not yet
  device_lost,  // sticky: every later call says so too, and what was on the device is gone
  failed,       // the operating system or the device refused, for a reason of its own
};
const char* to_string(Status status) noexcept;

enum class Access { none, read, read_write };

// The primitives by name, for counters and for faults.
// clang-format off
#define WARMSERVE_PRIMITIVES(X) \
  X(granule_create) X(granule_release) X(address_reserve) X(address_free) \
  X(map) X(unmap) X(set_access) X(pinned_create) \
  X(pinned_release) X(stream_create) X(stream_destroy) X(stream_synchronize) \
  X(stream_wait_event) X(event_create) X(event_destroy) X(event_record) \
  X(event_query) X(event_wait) X(copy_to_device) X(copy_from_device) X(copy_to_peer) X(launch)
// clang-format on
enum class Primitive : int {
#define X(name) name,
  WARMSERVE_PRIMITIVES(X)
#undef X
      count
};
const char* to_string(Primitive primitive) noexcept;

struct DeviceFacts {
  std::string name;
  std::uint64_t granularity = 0;  // bytes; every granule is a multiple, every reservation aligned
  bool threads = true;     // false: streams move only inside step, event_wait and synchronize
  bool host_view = true;   // the CPU reaches every granule; else it reaches none
  int cuda_ordinal = -1;   // of a CUDA device; -1: addresses are the CPU's
  std::vector<int> peers;  // CUDA devices that reach what is mapped here with read_write access
  std::string no_kernels;  // why launch() does not work; empty: it does
};

// A hint: work of a higher one is begun first where both wait. Copies may not heed it.
enum class StreamPriority { background, normal, urgent };

class Driver {
 public:
  virtual ~Driver() = default;

  virtual const DeviceFacts& facts() const noexcept = 0;
  // What the device said when a primitive failed last on this thread; empty where it says nothing.
  virtual std::string detail() const { return {}; }
  // Bytes that granules could still be made of, and bytes in all. An estimate: others take too.
  virtual Status memory(std::uint64_t* available, std::uint64_t* total) = 0;

  // A granule: physical memory without an address. `bytes` is a multiple of the granularity.
  // Its memory is really there on return, so touching it later cannot fail; what it holds is
  // undefined. Blocks.
  virtual Status granule_create(std::uint64_t bytes, Handle* out) = 0;
  // The memory goes when it is released and mapped nowhere.
  virtual Status granule_release(Handle handle) = 0;
  // Where the CPU can write the granule while it lives; null unless facts().host_view.
  virtual std::byte* host_view(Handle handle) noexcept = 0;
  // The CPU has written [offset, offset + bytes) of the granule through host_view; reads of the
  // device that are ordered after this call see it.
  virtual void host_wrote(Handle handle, std::uint64_t offset, std::uint64_t bytes) noexcept = 0;

  // A range of addresses, aligned to the granularity, with nothing behind it.
  virtual Status address_reserve(std::uint64_t bytes, Address* out) = 0;
  // Exactly a range that address_reserve returned, with nothing mapped in it.
  virtual Status address_free(Address address, std::uint64_t bytes) = 0;
  // Whole granules, one after the other from `address`, inside one reservation, over nothing
  // mapped. A granule may be mapped at several addresses. Grants no access.
  virtual Status map(Address address, const Handle* handles, std::size_t count) = 0;
  // Whole mappings only; may span several. The caller has waited for every use: unmap does not.
  virtual Status unmap(Address address, std::uint64_t bytes) = 0;
  // A range that is mapped throughout, in whole mappings, whose access was none.
  virtual Status set_access(Address address, std::uint64_t bytes, Access access) = 0;

  // Host memory that copies may read and write while the caller goes on. Exactly `bytes`
  // (a multiple of 4 KiB), really there on return. Blocks.
  // Kernels reach it at the same address.
  virtual Status pinned_create(std::uint64_t bytes, std::byte** out) = 0;
  // Also where it says device_lost.
  virtual Status pinned_release(std::byte* address, std::uint64_t bytes) = 0;

  virtual Status stream_create(StreamPriority priority, StreamId* out) = 0;
  // A stream that somebody else made on the device and keeps until all that is done with it here is
  // over; it is not destroyed here. invalid where the device knows no streams but its own.
  virtual Status stream_adopt(std::uint64_t, StreamId*) { return Status::invalid; }
  // Everything enqueued has completed. Blocks.
  virtual Status stream_destroy(StreamId stream) = 0;
  virtual Status stream_synchronize(StreamId stream) = 0;  // Blocks.
  // What is enqueued after this waits for the event's position as it is now.
  virtual Status stream_wait_event(StreamId stream, EventId event) = 0;
  // Runs one enqueued operation, where facts().threads is false; not_ready: none could run.
  virtual Status stream_step(StreamId stream) = 0;

  virtual Status event_create(EventId* out) = 0;
  virtual Status event_destroy(EventId event) = 0;                  // also while it is pending
  virtual Status event_record(EventId event, StreamId stream) = 0;  // overwrites
  // ok: complete, or never recorded. not_ready otherwise.
  virtual Status event_query(EventId event) = 0;
  // Blocks until complete (ok) or the timeout has passed (not_ready).
  virtual Status event_wait(EventId event, std::chrono::microseconds timeout) = 0;

  // Enqueued on the stream; host memory is read or written when the copy runs, and belongs to it
  // until then. The destination is writable, the source readable, at that time.
  virtual Status copy_to_device(Address to, const std::byte* from, std::uint64_t bytes,
                                StreamId stream) = 0;
  virtual Status copy_from_device(std::byte* to, Address from, std::uint64_t bytes,
                                  StreamId stream) = 0;
  // From this device's memory to memory of another that lets this one in (facts().peers there; of
  // the host device, any). As copy_to_device otherwise. The other device knows nothing of it:
  // whoever has waited for the copy tells it by peer_wrote, and unmaps nothing before.
  virtual Status copy_to_peer(Address to, Address from, std::uint64_t bytes, StreamId stream) = 0;
  // Another device has written [address, address + bytes); reads of this one that are enqueued
  // after this call see it.
  virtual void peer_wrote(Address, std::uint64_t) noexcept {}
  // Enqueued on the stream. What the call touches (kernels.h) is mapped with access for it, or
  // pinned, when it runs. invalid: the call is a misuse; failed: there are no kernels.
  virtual Status launch(const KernelCall& call, StreamId stream) = 0;
};

struct HostOptions {
  bool threads = true;     // streams are threads; else they move when stepped or waited for
  bool host_view = true;   // false: hide it, so that filling goes by staging as on a discrete GPU
  bool huge_pages = true;  // collapse granules to huge pages where the kernel does it
  std::string root{};      // where /proc and /sys are, for tests
};
// Throws general, naming the system call that failed.
std::shared_ptr<Driver> make_host_driver(const HostOptions& options);

struct CudaOptions {
  std::string library = "libcuda.so.1";  // or a path
  int ordinal = 0;
  std::string kernels;       // an image of weight_kernels.cu; empty: no kernels
  std::vector<int> peers{};  // ordinals of devices that may write its memory
};
// Throws general with a sentence that says what to do where there is no driver, one before 12.0, or
// no device that can do this; invalid_argument for an ordinal that is not there, and for a peer
// that does not reach the device's memory.
std::shared_ptr<Driver> make_cuda_driver(const CudaOptions& options);

}  // namespace warmserve
