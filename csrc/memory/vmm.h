// The driver's objects as RAII. Only this file turns statuses into exceptions.
//
// Destructors are noexcept and touch the device only in the process that created it: a forked child
// leaks what it inherited, and so does a process that is exiting.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "driver/driver.h"

namespace warmserve {

// A driver with error checks and call counters. All objects created on it share it.
class Device {
 public:
  struct Count {
    std::atomic<std::uint64_t> calls{0}, nanoseconds{0};
  };

  explicit Device(std::shared_ptr<Driver> driver);
  ~Device();
  Device(const Device&) = delete;

  Driver& driver() const noexcept { return *driver_; }
  const DeviceFacts& facts() const noexcept { return driver_->facts(); }
  // Returns false in a forked child and in a process that is exiting: objects then leak.
  bool usable() const noexcept;
  // Reports the bytes left for granules, and the total; both 0 if the device does not tell.
  void memory(std::uint64_t* available, std::uint64_t* total) const noexcept;
  // Waits for everything that the process has enqueued on the device. Blocks.
  void synchronize() { call(Primitive::device_synchronize, &Driver::device_synchronize); }
  // Throws device_lost, with the reason, after any call has returned that status.
  void require_alive() const;
  bool lost() const noexcept { return lost_.load(std::memory_order_relaxed); }
  static void process_exits() noexcept;

  // Calls a primitive, counts the call, and throws unless the status is ok. Example:
  // device.call(Primitive::map, &Driver::map, address, handles, count).
  template <typename Method, typename... Args>
  void call(Primitive primitive, Method method, Args&&... args) {
    const Status status = attempt(primitive, method, std::forward<Args>(args)...);
    if (status != Status::ok) fail(primitive, status);
  }
  // The same, but returns the status: for destructors, queries and rollbacks.
  template <typename Method, typename... Args>
  Status attempt(Primitive primitive, Method method, Args&&... args) noexcept {
    if (!usable()) return Status::failed;
    if (lost()) return Status::device_lost;
    const auto start = Clock::now();
    Status status;
    try {
      status = ((*driver_).*method)(std::forward<Args>(args)...);
    } catch (const std::bad_alloc&) {
      status = Status::out_of_memory;
    }
    Count& count = counts_[static_cast<std::size_t>(primitive)];
    count.calls.fetch_add(1, std::memory_order_relaxed);
    count.nanoseconds.fetch_add(
        static_cast<std::uint64_t>(std::chrono::nanoseconds(Clock::now() - start).count()),
        std::memory_order_relaxed);
    if (status == Status::device_lost) lost_.store(true, std::memory_order_relaxed);
    return status;
  }
  // For destructors: calls a primitive that releases something. Does nothing if the device is not
  // usable, or is lost (except for pinned memory, which belongs to the system and is released).
  // If the driver refuses, keeps `release`, and retry_releases() tries it again.
  void give_back(Primitive primitive, std::function<Status(Driver&)> release) noexcept;
  // Retries refused releases in their order. Returns true if no refused release is left.
  bool retry_releases() noexcept;
  const Count& count(Primitive primitive) const noexcept {
    return counts_[static_cast<std::size_t>(primitive)];
  }

  [[noreturn]] void fail(Primitive primitive, Status status) const;

 private:
  std::shared_ptr<Driver> driver_;
  std::atomic<bool> lost_{false};
  const std::uint64_t born_;  // process generation, see vmm.cpp
  std::mutex mutex_;          // a leaf: guards refused_
  std::vector<std::pair<Primitive, std::function<Status(Driver&)>>> refused_;
  std::array<Count, static_cast<std::size_t>(Primitive::count)> counts_;
};
using DevicePtr = std::shared_ptr<Device>;

// An exported granule. Its descriptor is closed with it.
class ExportedGranule {
 public:
  explicit ExportedGranule(const SharedGranule& shared) noexcept : shared_(shared) {}
  ExportedGranule(ExportedGranule&& other) noexcept
      : shared_(std::exchange(other.shared_, SharedGranule{})) {}
  ExportedGranule& operator=(ExportedGranule&&) = delete;
  ~ExportedGranule();

  const SharedGranule& shared() const noexcept { return shared_; }

 private:
  SharedGranule shared_;
};

// One physical granule.
class Granule {
 public:
  Granule(DevicePtr device, std::uint64_t bytes);  // throws out_of_device_memory; blocks
  // Imports a granule that another process has exported. The descriptor stays the caller's.
  Granule(DevicePtr device, const SharedGranule& shared, std::uint64_t bytes);
  Granule(Granule&& other) noexcept;
  Granule& operator=(Granule&&) = delete;
  ~Granule();

  Handle handle() const noexcept { return handle_; }
  std::byte* host_view() const noexcept { return host_view_; }  // null if the CPU has no access
  ExportedGranule exported() const;
  // Releases the granule; also succeeds if the device is lost. Strong.
  void release();

 private:
  DevicePtr device_;
  Handle handle_ = Handle::none;
  std::byte* host_view_ = nullptr;
};

// A range of addresses. While it lives, the addresses are used for nothing else.
class Reservation {
 public:
  Reservation(DevicePtr device, std::uint64_t bytes);
  ~Reservation();  // Precondition: nothing is mapped in it.
  Reservation(const Reservation&) = delete;

  Address address() const noexcept { return address_; }
  std::uint64_t bytes() const noexcept { return bytes_; }

  const DevicePtr& device() const noexcept { return device_; }

 private:
  DevicePtr device_;
  Address address_ = 0;
  std::uint64_t bytes_;
};
using ReservationPtr = std::shared_ptr<Reservation>;

// Granules mapped in a reservation. They have no access until set_access(). The caller keeps the
// granules alive, and waits for every use before it unmaps or destroys the mapping.
class Mapping {
 public:
  // Strong: if it throws, nothing is mapped.
  Mapping(ReservationPtr reservation, std::uint64_t offset, std::span<const Handle> handles,
          std::uint64_t granule_bytes);
  Mapping(Mapping&& other) noexcept = default;
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping();

  Address address() const noexcept { return address_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  // Both are strong: if one throws, the mapping is unchanged. unmap() succeeds on a lost device.
  void set_access(Access access);
  void unmap();
  // Maps the granules of adjacent ranges, the first at `offset`, by one driver call. Returns a
  // mapping for each range. Strong.
  static std::vector<Mapping> map_together(const ReservationPtr& reservation, std::uint64_t offset,
                                           std::span<const std::vector<Handle>> ranges,
                                           std::uint64_t granule_bytes);
  // Sets the access of adjacent mappings, or unmaps them, by one driver call. Strong.
  // Precondition: they are adjacent mappings of one reservation, in ascending order.
  static void set_access_together(std::span<Mapping* const> adjacent, Access access);
  static void unmap_together(std::span<Mapping* const> adjacent);

 private:
  struct Mapped {};
  Mapping(ReservationPtr reservation, Address address, std::uint64_t bytes, Mapped) noexcept
      : reservation_(std::move(reservation)), address_(address), bytes_(bytes) {}

  ReservationPtr reservation_;  // null: unmapped, or moved from
  Address address_;
  std::uint64_t bytes_;
};

class Event;

class Stream {
 public:
  explicit Stream(DevicePtr device, StreamPriority priority = StreamPriority::normal);
  // Wraps a stream created elsewhere. Its owner must keep it alive as long as this object. Throws
  // invalid_argument if the device accepts only its own streams, or if the handle is of no live
  // stream of the device.
  static std::shared_ptr<Stream> adopt(DevicePtr device, std::uint64_t handle);
  ~Stream();  // waits for enqueued work, unless the stream is adopted
  Stream(const Stream&) = delete;

  StreamId id() const noexcept { return id_; }
  bool adopted() const noexcept { return !owned_; }
  const DevicePtr& device() const noexcept { return device_; }
  // Throws invalid_argument, with a sentence that says how to capture, if the stream is being
  // captured, or if its owner has destroyed it.
  void refuse_capture() const;
  // Waits while the stream is being captured. Blocks. Throws timeout, or what poll throws.
  void await_capture_end(Deadline deadline, const Poll& poll) const;
  void copy_to_device(Address to, const std::byte* from, std::uint64_t bytes);
  void copy_from_device(std::byte* to, Address from, std::uint64_t bytes);
  void copy_to_peer(Address to, Address from, std::uint64_t bytes);
  void fill_zero(Address to, std::uint64_t bytes);
  void launch(const KernelCall& call);
  // Makes work that is enqueued later wait for the event as it is recorded now.
  void wait_for(const Event& event);
  bool step();
  void synchronize();  // Blocks.

 private:
  struct Adopted {};
  Stream(DevicePtr device, StreamId id, Adopted)
      : device_(std::move(device)), id_(id), owned_(false) {}

  DevicePtr device_;
  StreamId id_{};
  const bool owned_ = true;
};

class Event {
 public:
  explicit Event(DevicePtr device);
  Event(Event&& other) noexcept;
  Event& operator=(Event&&) = delete;
  ~Event();

  EventId id() const noexcept { return *id_; }
  void record(StreamId stream);
  bool complete() const;
  // Blocks until complete. Throws timeout, or what poll throws.
  void wait(Deadline deadline, const Poll& poll) const;

 private:
  DevicePtr device_;
  std::optional<EventId> id_;
};

// A position in a stream that must be reached before the memory it guards is unmapped. Creating one
// never fails. If the stream is being captured, or the driver refuses an event, wait() waits for
// the end of the capture and then for the whole stream; for the whole device if the stream is
// adopted, because its owner may have destroyed it.
class Fence {
 public:
  explicit Fence(std::shared_ptr<Stream> stream) noexcept;
  // Throws if the stream is being captured, was destroyed, or is adopted and cannot be recorded.
  // The fence guards the memory even then.
  void require_recorded() const {
    if (refused_) std::rethrow_exception(refused_);
  }
  bool complete() const;  // also false if the fence has no event
  // Blocks. Throws timeout, or what poll throws; the wait for a whole stream ignores both.
  void wait(Deadline deadline, const Poll& poll) const;

 private:
  std::shared_ptr<Stream> stream_;  // kept alive for waiters
  std::optional<Event> event_;
  std::exception_ptr refused_;
};
using FencePtr = std::shared_ptr<const Fence>;

class PinnedRegion {
 public:
  PinnedRegion(DevicePtr device, std::uint64_t bytes);  // Blocks.
  ~PinnedRegion();
  PinnedRegion(const PinnedRegion&) = delete;

  std::byte* data() const noexcept { return data_; }
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  DevicePtr device_;
  std::byte* data_ = nullptr;
  std::uint64_t bytes_;
};

}  // namespace warmserve
