// Everything this library asks of a device, as one table of primitives.
//
// These contracts bind the driver and are all that its callers may assume. They are CUDA's, the
// strictest of our devices.
//
// - A primitive returns a Status and never throws. Status::ok is 0. A primitive that fails has
//   changed nothing, unless its contract says otherwise.
// - "Blocks" marks a primitive that may wait for work on the device or take longer than a few
//   microseconds per granule. All other primitives return at once.
// - "Precondition" marks a duty of the caller. StrictDriver checks these duties.
// - Any thread may call any primitive. The caller must keep one thread from using an object while
//   another thread destroys it.
// - No thread calls the driver while it is marked by LockMark: every call may wait for a lock of
// the
//   driver, which another thread may hold for milliseconds.
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
  out_of_mappings,  // the process is near the operating system's limit of mappings
  out_of_addresses,
  invalid,      // the call breaks its contract
  not_ready,    // a query, a timed wait or a step: the work cannot complete yet
  device_lost,  // sticky: every later call returns it too, and the device's contents are lost
  failed,       // the operating system or the device refused for another reason
};
const char* to_string(Status status) noexcept;

enum class Access { none, read, read_write };

// The names of the primitives, for counters and fault injection.
// clang-format off
#define WARMSERVE_PRIMITIVES(X) \
  X(granule_create) X(granule_release) X(granule_export) X(granule_import) \
  X(address_reserve) X(address_free) X(map) X(unmap) X(set_access) X(pinned_create) X(pinned_release) \
  X(device_synchronize) X(stream_create) X(stream_destroy) \
  X(stream_synchronize) X(stream_capturing) X(stream_wait_event) X(event_create) X(event_destroy) \
  X(event_record) X(event_query) X(event_wait) X(copy_to_device) X(copy_from_device) \
  X(copy_to_peer) X(fill_zero) X(launch)
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
  std::uint64_t granularity = 0;  // bytes; granule sizes and reservation addresses are multiples
  bool threads = true;     // false: streams run only in stream_step, event_wait, stream_synchronize
  bool host_view = true;   // true: the CPU can access each granule created here; false: none
  int cuda_ordinal = -1;   // of a CUDA device; -1: device addresses are CPU addresses
  std::vector<int> peers;  // CUDA devices that can access memory mapped here as read_write
  std::string no_kernels;  // why launch() does not work; empty if it works
  int contents = -1;       // a descriptor of the contents record; -1: no record
};

// A granule as another process can import it.
struct SharedGranule {
  int descriptor = -1;       // of a file that holds the granule
  std::uint64_t offset = 0;  // of the granule in that file
};

// A hint: of two waiting operations, the one on the stream of higher priority starts first. Copies
// may ignore it.
enum class StreamPriority { background, normal, urgent };

class Driver {
 public:
  virtual ~Driver() = default;

  virtual const DeviceFacts& facts() const noexcept = 0;
  // Returns the device's own words about the primitive that failed last on this thread; empty if
  // it gave none.
  virtual std::string detail() const { return {}; }
  // Reports how many bytes are left for granules, and the device's total. An estimate: other users
  // allocate too.
  virtual Status memory(std::uint64_t* available, std::uint64_t* total) = 0;

  // Granules: physical memory without an address.

  // Creates a granule. Its memory is committed on return, so a later access cannot fail. Its
  // contents are undefined. Blocks.
  // Precondition: `bytes` is a positive multiple of the granularity.
  virtual Status granule_create(std::uint64_t bytes, Handle* out) = 0;
  // Releases a granule. Its memory is freed once no mapping of it is left.
  // Precondition: the granule is not released yet, and the caller has waited for every use of it,
  // also in the processes that imported it.
  virtual Status granule_release(Handle handle) = 0;
  // Returns a descriptor by which another process can import the granule, with read access only if
  // the device can enforce that. The caller closes it. A granule may be exported several times.
  // Returns failed if the device cannot share the granule.
  // Precondition: this driver created the granule, which is not released yet.
  virtual Status granule_export(Handle handle, SharedGranule* out) = 0;
  // Makes a granule of memory that another process has exported. Both share the memory and its
  // contents. The memory lives until both have released it or have ended; but if the other process
  // releases it first, its contents may be lost. The descriptor stays the caller's, who may close
  // it after the call. Such a granule is released like any other, and it has no host_view.
  // Returns invalid if the descriptor is of no such memory, or if this process already has the
  // granule and the device cannot tell the two apart.
  // Precondition: `bytes` is the granule's size. The granule is mapped with Access::read or none.
  virtual Status granule_import(const SharedGranule& shared, std::uint64_t bytes, Handle* out) = 0;
  // Returns the address at which the CPU can write the granule during its lifetime; null unless
  // facts().host_view and this driver created the granule.
  virtual std::byte* host_view(Handle handle) noexcept = 0;
  // Announces that the CPU has written [offset, offset + bytes) of the granule through host_view.
  // Device reads ordered after this call see those bytes. No device acts on it today; StrictDriver
  // records it.
  // Precondition: the range lies in the granule, and no stream still uses the granule.
  virtual void host_wrote(Handle handle, std::uint64_t offset, std::uint64_t bytes) noexcept = 0;

  // Addresses and mappings.

  // Reserves a range of addresses, aligned to the granularity, with nothing mapped in it.
  // Precondition: `bytes` is a positive multiple of the granularity.
  virtual Status address_reserve(std::uint64_t bytes, Address* out) = 0;
  // Frees a reservation.
  // Precondition: address_reserve returned exactly this range, and nothing is mapped in it.
  virtual Status address_free(Address address, std::uint64_t bytes) = 0;
  // Maps whole granules, one after the other from `address`. A granule may be mapped at several
  // addresses. Grants no access.
  // Precondition: `address` is aligned to the granularity; the range lies inside one reservation
  // and nothing is mapped in it.
  virtual Status map(Address address, const Handle* handles, std::size_t count) = 0;
  // Removes mappings. Does not wait for work that uses them.
  // Precondition: the range consists of one or more whole mappings, and the caller has waited for
  // every use of them.
  virtual Status unmap(Address address, std::uint64_t bytes) = 0;
  // Sets the access to mappings.
  // Precondition: the range consists of one or more whole mappings with Access::none. If `access`
  // is read_write, none of them is of an imported granule.
  virtual Status set_access(Address address, std::uint64_t bytes, Access access) = 0;

  // Pinned host memory.

  // Allocates exactly `bytes` of host memory that copies may read and write asynchronously and
  // kernels can access at the same address. The memory is committed on return. Blocks.
  // Precondition: `bytes` is a positive multiple of 4 KiB.
  virtual Status pinned_create(std::uint64_t bytes, std::byte** out) = 0;
  // Frees pinned memory, even if it returns device_lost.
  // Precondition: pinned_create returned exactly this region, and the caller has waited for every
  // use of it.
  virtual Status pinned_release(std::byte* address, std::uint64_t bytes) = 0;

  // Streams.

  virtual Status stream_create(StreamPriority priority, StreamId* out) = 0;
  // Wraps a stream created elsewhere on this device. Its owner must keep it alive while we use it;
  // we never destroy it. Returns invalid if the device accepts only its own streams, or if the
  // handle is of no live stream of this device; detail() then says which.
  virtual Status stream_adopt(std::uint64_t, StreamId*) { return Status::invalid; }
  // Destroys a stream. Blocks.
  // Precondition: the caller has waited for everything enqueued.
  virtual Status stream_destroy(StreamId stream) = 0;
  // Waits until everything enqueued so far has completed. Blocks.
  virtual Status stream_synchronize(StreamId stream) = 0;
  // Reports whether the stream is being captured into a graph. An event that is recorded then
  // becomes part of the graph and can never be queried. Returns invalid for a stream that its owner
  // has destroyed.
  virtual Status stream_capturing(StreamId stream, bool* out) = 0;
  // Waits until everything that this process has enqueued on the device so far has completed, also
  // on streams that were created elsewhere. Fails while a stream of the device is being captured.
  // Blocks.
  virtual Status device_synchronize() = 0;
  // Makes work that is enqueued later wait for the event as it is recorded now.
  virtual Status stream_wait_event(StreamId stream, EventId event) = 0;
  // Runs the next enqueued operation. Returns not_ready if none can run.
  // Precondition: facts().threads is false.
  virtual Status stream_step(StreamId stream) = 0;

  // Events.

  virtual Status event_create(EventId* out) = 0;
  // Destroys an event, even while it is pending.
  virtual Status event_destroy(EventId event) = 0;
  // Records the stream's current position, in place of an earlier recording.
  virtual Status event_record(EventId event, StreamId stream) = 0;
  // Returns ok if the event is complete or was never recorded, else not_ready.
  virtual Status event_query(EventId event) = 0;
  // Waits until the event is complete (ok) or the timeout has passed (not_ready). Blocks.
  virtual Status event_wait(EventId event, std::chrono::microseconds timeout) = 0;

  // Copies and kernels.

  // Enqueues a copy. The copy owns the host memory until it has completed.
  // Precondition: when the copy runs, the source is readable and filled, the destination is
  // writable, and no other use of either range races with the copy.
  virtual Status copy_to_device(Address to, const std::byte* from, std::uint64_t bytes,
                                StreamId stream) = 0;
  virtual Status copy_from_device(std::byte* to, Address from, std::uint64_t bytes,
                                  StreamId stream) = 0;
  // Enqueues a copy, as above, from this device's memory to the memory of another device that
  // grants this one access (facts().peers of the other device; a host device grants it to any). The
  // other device does not notice the copy: after waiting for it, the caller calls peer_wrote there,
  // and unmaps nothing before that.
  virtual Status copy_to_peer(Address to, Address from, std::uint64_t bytes, StreamId stream) = 0;
  // Announces that another device has written [address, address + bytes). Reads that are enqueued
  // on this device after this call see those bytes. No device acts on it today; StrictDriver
  // records it.
  // Precondition: the range is mapped with read_write access.
  virtual void peer_wrote(Address, std::uint64_t) noexcept {}
  // Enqueues zeros, which no link carries.
  // Precondition: when this runs, the range is writable, and no other use of it races with this.
  virtual Status fill_zero(Address to, std::uint64_t bytes, StreamId stream) = 0;
  // Announces that this thread has just read `bytes` of a file into memory that copies read. A
  // simulated device takes the time of such a read on its own clock; others do nothing.
  virtual void host_read(std::uint64_t) noexcept {}
  // Enqueues a kernel. Returns invalid if the call is a misuse (kernels.h), and failed if the
  // device has no kernels. Precondition: when the kernel runs, every range that it touches
  // (kernels.h) is pinned, or mapped with the access it needs, and the ranges that it reads are
  // filled.
  virtual Status launch(const KernelCall& call, StreamId stream) = 0;
};

struct HostOptions {
  bool threads = true;  // true: a thread per stream; false: streams run when stepped or waited for
  bool host_view = true;   // false: hide it, so that loads use staging as on a discrete GPU
  bool huge_pages = true;  // collapse granules to huge pages if the kernel supports it
  std::string root{};      // prefix of /proc and /sys, for tests
  // A descriptor of the memory for all granules, whose size is fixed; it stays the caller's. The
  // driver keeps the contents: granules of one size lie in the memory one after the other, in the
  // order in which they are made. -1: the driver makes its memory.
  int memory = -1;
  // A descriptor of the contents record of that memory (memory/contents.h). It stays the caller's.
  // -1: no record.
  int contents = -1;
};
// Throws general, which names the system call that failed.
std::shared_ptr<Driver> make_host_driver(const HostOptions& options);

struct CudaOptions {
  std::string library = "libcuda.so.1";  // a name or a path
  int ordinal = 0;
  std::string kernels;       // an image of weight_kernels.cu; empty: no kernels
  std::vector<int> peers{};  // ordinals of devices that may write this device's memory
};
// Throws general, with a sentence that says what to do, if the driver is missing or older
// than 12.0, or if the device has no virtual memory management or refuses a context;
// invalid_argument for an unknown ordinal and for a peer that cannot access the device's memory.
std::shared_ptr<Driver> make_cuda_driver(const CudaOptions& options);

}  // namespace warmserve
