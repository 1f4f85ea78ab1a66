// The driver's objects as RAII: statuses become exceptions here, once, and nowhere else.
//
// Destructors are noexcept and touch the device only in the process that made it: after a fork the
// child leaks what it inherited, and close() of the interpreter has the same effect.
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

// A driver, checked and counted. Shared by everything made on it.
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
  // False in a forked child, and once the process exits: leak instead.
  bool usable() const noexcept;
  // Bytes that granules could still be made of, and in all; both 0 where it does not say.
  void memory(std::uint64_t* available, std::uint64_t* total) const noexcept;
  // Throws device_lost, saying of what, once any call has met it.
  void require_alive() const;
  bool lost() const noexcept { return lost_.load(std::memory_order_relaxed); }
  static void process_exits() noexcept;

  // Calls a primitive, counts it, and throws what a status other than ok means. The vocabulary is
  // the Driver's: device.call(Primitive::map, &Driver::map, address, handles, count).
  template <typename Method, typename... Args>
  void call(Primitive primitive, Method method, Args&&... args) {
    const Status status = attempt(primitive, method, std::forward<Args>(args)...);
    if (status != Status::ok) fail(primitive, status);
  }
  // The same without the throw, for destructors, queries and rollbacks.
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
  // For destructors: calls a primitive that gives something back. Where the device is not usable,
  // or lost, it is left (but for pinned memory, which is the system's); where the driver refuses,
  // `release` is kept and tried again by retry_releases().
  void give_back(Primitive primitive, std::function<Status(Driver&)> release) noexcept;
  // In the order they were refused. True when none is left.
  bool retry_releases() noexcept;
  const Count& count(Primitive primitive) const noexcept {
    return counts_[static_cast<std::size_t>(primitive)];
  }

  [[noreturn]] void fail(Primitive primitive, Status status) const;

 private:
  std::shared_ptr<Driver> driver_;
  std::atomic<bool> lost_{false};
  const std::uint64_t born_;  // generation of the process, see vmm.cpp
  std::mutex mutex_;          // a leaf: guards refused_
  std::vector<std::pair<Primitive, std::function<Status(Driver&)>>> refused_;
  std::array<Count, static_cast<std::size_t>(Primitive::count)> counts_;
};
using DevicePtr = std::shared_ptr<Device>;

// One physical granule.
class Granule {
 public:
  Granule(DevicePtr device, std::uint64_t bytes);  // throws out_of_device_memory. Blocks.
  Granule(Granule&& other) noexcept;
  Granule& operator=(Granule&&) = delete;
  ~Granule();

  Handle handle() const noexcept { return handle_; }
  std::byte* host_view() const noexcept { return host_view_; }  // null where the CPU cannot reach
  void release();  // throws; the granule is then as before. Done where the device is lost.

 private:
  DevicePtr device_;
  Handle handle_ = Handle::none;
  std::byte* host_view_ = nullptr;
};

// A range of addresses. Whoever holds it keeps the addresses from being anything else.
class Reservation {
 public:
  Reservation(DevicePtr device, std::uint64_t bytes);
  ~Reservation();  // with nothing mapped
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

// Granules placed in a reservation, without access until it is set. The caller keeps the granules,
// and has waited for every use before it unmaps or destroys.
class Mapping {
 public:
  // Strong: throws with nothing mapped.
  Mapping(ReservationPtr reservation, std::uint64_t offset, std::span<const Handle> handles,
          std::uint64_t granule_bytes);
  Mapping(Mapping&& other) noexcept = default;
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping();

  Address address() const noexcept { return address_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  // Strong: throws with the mapping as it was. Unmapping from a device that is lost is done.
  void set_access(Access access);
  void unmap();
  // One driver call for mappings that lie side by side, in ascending order, of one reservation.
  // Strong.
  static void unmap_together(std::span<Mapping* const> neighbours);

 private:
  ReservationPtr reservation_;  // null: unmapped, or moved from
  Address address_;
  std::uint64_t bytes_;
};

class Event;

class Stream {
 public:
  explicit Stream(DevicePtr device, StreamPriority priority = StreamPriority::normal);
  // One that somebody else made and keeps alive as long as this is. Throws invalid_argument where
  // the device has none.
  static std::shared_ptr<Stream> adopt(DevicePtr device, std::uint64_t handle);
  ~Stream();  // waits for what is enqueued
  Stream(const Stream&) = delete;

  StreamId id() const noexcept { return id_; }
  const DevicePtr& device() const noexcept { return device_; }
  void copy_to_device(Address to, const std::byte* from, std::uint64_t bytes);
  void copy_from_device(std::byte* to, Address from, std::uint64_t bytes);
  void copy_to_peer(Address to, Address from, std::uint64_t bytes);
  void launch(const KernelCall& call);
  // What is enqueued from here on waits for the event's position as it is now.
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

// A position in a stream that somebody will have to wait for. Made without fail: where the driver
// refuses an event, all that the stream has by then is waited for instead.
class Fence {
 public:
  explicit Fence(std::shared_ptr<Stream> stream) noexcept;
  bool complete() const;  // false also where only waiting can tell
  // Blocks. Throws timeout (not where the stream itself is waited for), or what poll throws.
  void wait(Deadline deadline, const Poll& poll) const;

 private:
  std::shared_ptr<Stream> stream_;  // lives as long as somebody may wait for it
  std::optional<Event> event_;
};

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
