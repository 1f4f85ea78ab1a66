#include "memory/vmm.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <thread>

namespace warmserve {
namespace {

// Incremented in the child at each fork. A device of another generation belongs to another process.
std::atomic<std::uint64_t> generation{0};
std::atomic<bool> exiting{false};

std::uint64_t current_generation() {
  static std::once_flag once;
  std::call_once(once, [] {
    ::pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });
  });
  return generation.load(std::memory_order_relaxed);
}

}  // namespace

Device::Device(std::shared_ptr<Driver> driver)
    : driver_(std::move(driver)), born_(current_generation()) {}

Device::~Device() {
  retry_releases();
  // A forked child must not destroy its parent's driver: the driver's threads do not exist in the
  // child, and its addresses may have another use by now. So the driver leaks.
  if (!usable()) new std::shared_ptr<Driver>(std::move(driver_));
}

bool Device::usable() const noexcept {
  return born_ == generation.load(std::memory_order_relaxed) &&
         !exiting.load(std::memory_order_relaxed);
}

void Device::give_back(Primitive primitive, std::function<Status(Driver&)> release) noexcept {
  if (!usable() || (lost() && primitive != Primitive::pinned_release)) return;
  Count& count = counts_[static_cast<std::size_t>(primitive)];
  count.calls.fetch_add(1, std::memory_order_relaxed);
  const Status status = release(*driver_);
  if (status == Status::device_lost) lost_.store(true, std::memory_order_relaxed);
  if (status == Status::ok || status == Status::device_lost) return;
  const std::lock_guard lock(mutex_);
  refused_.emplace_back(primitive, std::move(release));
}

bool Device::retry_releases() noexcept {
  std::vector<std::pair<Primitive, std::function<Status(Driver&)>>> refused;
  {
    const std::lock_guard lock(mutex_);
    refused.swap(refused_);
  }
  for (auto& [primitive, release] : refused) give_back(primitive, std::move(release));
  const std::lock_guard lock(mutex_);
  return refused_.empty();
}

void Device::memory(std::uint64_t* available, std::uint64_t* total) const noexcept {
  if (usable() && !lost() && driver_->memory(available, total) == Status::ok) return;
  *available = *total = 0;
}

void Device::require_alive() const {
  if (!lost()) return;
  const std::string detail = driver_->detail();
  throw Error(ErrorKind::device_lost, detail.empty() ? facts().name + " was lost" : detail);
}

void Device::process_exits() noexcept { exiting.store(true, std::memory_order_relaxed); }

void Device::fail(Primitive primitive, Status status) const {
  std::string message = std::string(to_string(primitive)) + ": " + to_string(status);
  if (const std::string detail = driver_->detail(); !detail.empty()) message += ": " + detail;
  switch (status) {
    case Status::out_of_memory:
    case Status::out_of_mappings:
    case Status::out_of_addresses: throw Error(ErrorKind::out_of_device_memory, message);
    case Status::device_lost: throw Error(ErrorKind::device_lost, message);
    default: throw Error(ErrorKind::general, message);
  }
}

ExportedGranule::~ExportedGranule() {
  if (shared_.descriptor >= 0) ::close(shared_.descriptor);
}

Granule::Granule(DevicePtr device, std::uint64_t bytes) : device_(std::move(device)) {
  device_->call(Primitive::granule_create, &Driver::granule_create, bytes, &handle_);
  host_view_ = device_->driver().host_view(handle_);
}
Granule::Granule(DevicePtr device, const SharedGranule& shared, std::uint64_t bytes)
    : device_(std::move(device)) {
  device_->call(Primitive::granule_import, &Driver::granule_import, shared, bytes, &handle_);
}
Granule::Granule(Granule&& other) noexcept
    : device_(other.device_),
      handle_(std::exchange(other.handle_, Handle::none)),
      host_view_(other.host_view_) {}
Granule::~Granule() {
  if (handle_ == Handle::none) return;
  device_->give_back(Primitive::granule_release,
                     [handle = handle_](Driver& driver) { return driver.granule_release(handle); });
}
ExportedGranule Granule::exported() const {
  SharedGranule shared;
  device_->call(Primitive::granule_export, &Driver::granule_export, handle_, &shared);
  return ExportedGranule(shared);
}
void Granule::release() {
  const Status status =
      device_->attempt(Primitive::granule_release, &Driver::granule_release, handle_);
  if (status != Status::ok && status != Status::device_lost)
    device_->fail(Primitive::granule_release, status);
  handle_ = Handle::none;
}

Reservation::Reservation(DevicePtr device, std::uint64_t bytes)
    : device_(std::move(device)), bytes_(bytes) {
  device_->call(Primitive::address_reserve, &Driver::address_reserve, bytes_, &address_);
}
Reservation::~Reservation() {
  device_->give_back(Primitive::address_free, [address = address_, bytes = bytes_](Driver& driver) {
    return driver.address_free(address, bytes);
  });
}
Mapping::Mapping(ReservationPtr reservation, std::uint64_t offset, std::span<const Handle> handles,
                 std::uint64_t granule_bytes)
    : reservation_(std::move(reservation)),
      address_(reservation_->address() + offset),
      bytes_(handles.size() * granule_bytes) {
  reservation_->device()->call(Primitive::map, &Driver::map, address_, handles.data(),
                               handles.size());
}
Mapping::~Mapping() {
  if (!reservation_) return;
  const DevicePtr device = reservation_->device();
  device->give_back(Primitive::unmap,
                    [reservation = std::move(reservation_), address = address_,
                     bytes = bytes_](Driver& driver) { return driver.unmap(address, bytes); });
}
void Mapping::set_access(Access access) {
  Mapping* self = this;
  set_access_together(std::span(&self, 1), access);
}
void Mapping::set_access_together(std::span<Mapping* const> adjacent, Access access) {
  const Mapping& first = *adjacent.front();
  const Mapping& last = *adjacent.back();
  first.reservation_->device()->call(Primitive::set_access, &Driver::set_access, first.address_,
                                     last.address_ + last.bytes_ - first.address_, access);
}
std::vector<Mapping> Mapping::map_together(const ReservationPtr& reservation, std::uint64_t offset,
                                           std::span<const std::vector<Handle>> ranges,
                                           std::uint64_t granule_bytes) {
  std::vector<Handle> all;
  for (const std::vector<Handle>& range : ranges) all.insert(all.end(), range.begin(), range.end());
  std::vector<Mapping> mappings;
  mappings.reserve(ranges.size());
  Mapping whole(reservation, offset, all, granule_bytes);

  whole.reservation_.reset();  // the mappings of the ranges own it from here on
  Address at = whole.address_;
  for (const std::vector<Handle>& range : ranges) {
    mappings.push_back(Mapping(reservation, at, range.size() * granule_bytes, Mapped()));
    at += mappings.back().bytes_;
  }
  return mappings;
}
void Mapping::unmap() {
  Mapping* self = this;
  unmap_together(std::span(&self, 1));
}
void Mapping::unmap_together(std::span<Mapping* const> adjacent) {
  const Mapping& first = *adjacent.front();
  const Mapping& last = *adjacent.back();
  Device& device = *first.reservation_->device();
  const Status status = device.attempt(Primitive::unmap, &Driver::unmap, first.address_,
                                       last.address_ + last.bytes_ - first.address_);
  if (status != Status::ok && status != Status::device_lost) device.fail(Primitive::unmap, status);
  for (Mapping* mapping : adjacent) mapping->reservation_.reset();
}

Stream::Stream(DevicePtr device, StreamPriority priority) : device_(std::move(device)) {
  device_->call(Primitive::stream_create, &Driver::stream_create, priority, &id_);
}
std::shared_ptr<Stream> Stream::adopt(DevicePtr device, std::uint64_t handle) {
  if (!device->usable())
    throw Error(
        ErrorKind::general,
        device->facts().name + " cannot be used in a forked child or at the end of a process");
  StreamId id{};
  if (const Status status = device->driver().stream_adopt(handle, &id); status != Status::ok) {
    const std::string detail = device->driver().detail();
    if (status == Status::device_lost) throw Error(ErrorKind::device_lost, detail);
    throw Error(ErrorKind::invalid_argument,
                detail.empty()
                    ? device->facts().name + " accepts only streams made by Runtime.stream()"
                    : "the stream cannot be used on " + device->facts().name + ": " + detail);
  }
  return std::shared_ptr<Stream>(new Stream(std::move(device), id, Adopted{}));
}
Stream::~Stream() {
  if (!owned_) return;
  device_->give_back(Primitive::stream_destroy, [id = id_](Driver& driver) {
    const Status status = driver.stream_synchronize(id);
    return status == Status::ok ? driver.stream_destroy(id) : status;
  });
}
void Stream::refuse_capture() const {
  if (!device_->usable()) return;  // the operation that uses the stream says why it fails
  bool capturing = false;
  const Status status =
      device_->attempt(Primitive::stream_capturing, &Driver::stream_capturing, id_, &capturing);
  if (status == Status::invalid)
    throw Error(ErrorKind::invalid_argument,
                "the stream cannot be used on " + device_->facts().name +
                    ", its owner may have destroyed it: " + device_->driver().detail());
  if (status != Status::ok) device_->fail(Primitive::stream_capturing, status);
  if (capturing)
    throw Error(ErrorKind::invalid_argument,
                "the stream is being captured into a CUDA graph: acquire the lease before the "
                "capture begins, record the stream after the capture has ended, and replay the "
                "graph under a lease");
}
void Stream::await_capture_end(Deadline deadline, const Poll& poll) const {
  for (;;) {
    bool capturing = false;
    const Status status =
        device_->attempt(Primitive::stream_capturing, &Driver::stream_capturing, id_, &capturing);
    if (status != Status::ok || !capturing) return;
    const Clock::time_point now = Clock::now();
    if (now >= deadline)
      throw Error(ErrorKind::timeout,
                  "a stream was still being captured at the end of the timeout");
    std::this_thread::sleep_for(std::min<Clock::duration>(kPollInterval, deadline - now));
    if (poll) poll();
  }
}
void Stream::copy_to_device(Address to, const std::byte* from, std::uint64_t bytes) {
  device_->call(Primitive::copy_to_device, &Driver::copy_to_device, to, from, bytes, id_);
}
void Stream::copy_from_device(std::byte* to, Address from, std::uint64_t bytes) {
  device_->call(Primitive::copy_from_device, &Driver::copy_from_device, to, from, bytes, id_);
}
void Stream::copy_to_peer(Address to, Address from, std::uint64_t bytes) {
  device_->call(Primitive::copy_to_peer, &Driver::copy_to_peer, to, from, bytes, id_);
}

void Stream::fill_zero(Address to, std::uint64_t bytes) {
  device_->call(Primitive::fill_zero, &Driver::fill_zero, to, bytes, id_);
}
void Stream::launch(const KernelCall& call) {
  device_->call(Primitive::launch, &Driver::launch, call, id_);
}
void Stream::wait_for(const Event& event) {
  device_->call(Primitive::stream_wait_event, &Driver::stream_wait_event, id_, event.id());
}
bool Stream::step() { return device_->driver().stream_step(id_) == Status::ok; }
void Stream::synchronize() {
  device_->call(Primitive::stream_synchronize, &Driver::stream_synchronize, id_);
}

Event::Event(DevicePtr device) : device_(std::move(device)) {
  EventId id{};
  device_->call(Primitive::event_create, &Driver::event_create, &id);
  id_ = id;
}
Event::Event(Event&& other) noexcept
    : device_(other.device_), id_(std::exchange(other.id_, std::nullopt)) {}
Event::~Event() {
  if (!id_) return;
  device_->give_back(Primitive::event_destroy,
                     [id = *id_](Driver& driver) { return driver.event_destroy(id); });
}
void Event::record(StreamId stream) {
  device_->call(Primitive::event_record, &Driver::event_record, *id_, stream);
}
bool Event::complete() const {
  const Status status = device_->attempt(Primitive::event_query, &Driver::event_query, *id_);
  if (status != Status::ok && status != Status::not_ready)
    device_->fail(Primitive::event_query, status);
  return status == Status::ok;
}
void Event::wait(Deadline deadline, const Poll& poll) const {
  using std::chrono::microseconds;
  for (;;) {
    const auto left = std::chrono::ceil<microseconds>(deadline - Clock::now());
    const auto slice = std::clamp<microseconds>(left, microseconds(0), kPollInterval);
    const Status status = device_->attempt(Primitive::event_wait, &Driver::event_wait, *id_, slice);
    if (status == Status::ok) return;
    if (status != Status::not_ready) device_->fail(Primitive::event_wait, status);
    if (left <= microseconds(0))
      throw Error(ErrorKind::timeout, "a stream did not reach its fence in time");
    if (poll) poll();
  }
}

Fence::Fence(std::shared_ptr<Stream> stream) noexcept : stream_(std::move(stream)) {
  try {
    stream_->refuse_capture();
  } catch (const Error&) {
    refused_ = std::current_exception();
    return;
  }
  try {
    event_.emplace(stream_->device());
  } catch (const Error&) {
    return;
  }
  try {
    event_->record(stream_->id());
  } catch (const Error&) {
    event_.reset();
    if (stream_->adopted()) refused_ = std::current_exception();
  }
}
bool Fence::complete() const { return event_ && event_->complete(); }
void Fence::wait(Deadline deadline, const Poll& poll) const {
  if (event_) return event_->wait(deadline, poll);
  stream_->await_capture_end(deadline, poll);
  if (stream_->adopted())
    stream_->device()->synchronize();
  else
    stream_->synchronize();
}

PinnedRegion::PinnedRegion(DevicePtr device, std::uint64_t bytes)
    : device_(std::move(device)), bytes_(bytes) {
  device_->call(Primitive::pinned_create, &Driver::pinned_create, bytes_, &data_);
}
PinnedRegion::~PinnedRegion() {
  device_->give_back(Primitive::pinned_release, [data = data_, bytes = bytes_](Driver& driver) {
    return driver.pinned_release(data, bytes);
  });
}

}  // namespace warmserve
