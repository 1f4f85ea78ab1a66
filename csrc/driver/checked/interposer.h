// A driver that forwards every call to another driver: the base of wrappers that change some calls.
#pragma once

#include <memory>
#include <utility>

#include "driver/driver.h"

namespace warmserve {

class Interposer : public Driver {
 public:
  explicit Interposer(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {}

  const DeviceFacts& facts() const noexcept override { return inner_->facts(); }
  std::string detail() const override { return inner_->detail(); }
  Status memory(std::uint64_t* available, std::uint64_t* total) override {
    return inner_->memory(available, total);
  }
  std::byte* host_view(Handle handle) noexcept override { return inner_->host_view(handle); }
  void host_wrote(Handle handle, std::uint64_t offset, std::uint64_t bytes) noexcept override {
    inner_->host_wrote(handle, offset, bytes);
  }
  Status stream_adopt(std::uint64_t handle, StreamId* out) override {
    return inner_->stream_adopt(handle, out);
  }
  void peer_wrote(Address address, std::uint64_t bytes) noexcept override {
    inner_->peer_wrote(address, bytes);
  }
  void host_read(std::uint64_t bytes) noexcept override { inner_->host_read(bytes); }
  Status stream_step(StreamId stream) override { return inner_->stream_step(stream); }

#define WARMSERVE_FORWARD(name, parameters, ...)                      \
  Status name parameters override {                                   \
    const Status status = before(Primitive::name);                    \
    return status == Status::ok ? inner_->name(__VA_ARGS__) : status; \
  }
  WARMSERVE_FORWARD(granule_create, (std::uint64_t bytes, Handle* out), bytes, out)
  WARMSERVE_FORWARD(granule_release, (Handle handle), handle)
  WARMSERVE_FORWARD(granule_export, (Handle handle, SharedGranule* out), handle, out)
  WARMSERVE_FORWARD(granule_import, (const SharedGranule& shared, std::uint64_t bytes, Handle* out),
                    shared, bytes, out)
  WARMSERVE_FORWARD(address_reserve, (std::uint64_t bytes, Address* out), bytes, out)
  WARMSERVE_FORWARD(address_free, (Address address, std::uint64_t bytes), address, bytes)
  WARMSERVE_FORWARD(map, (Address address, const Handle* handles, std::size_t count), address,
                    handles, count)
  WARMSERVE_FORWARD(unmap, (Address address, std::uint64_t bytes), address, bytes)
  WARMSERVE_FORWARD(set_access, (Address address, std::uint64_t bytes, Access access), address,
                    bytes, access)
  WARMSERVE_FORWARD(pinned_create, (std::uint64_t bytes, std::byte** out), bytes, out)
  WARMSERVE_FORWARD(pinned_release, (std::byte * address, std::uint64_t bytes), address, bytes)
  WARMSERVE_FORWARD(stream_create, (StreamPriority priority, StreamId* out), priority, out)
  WARMSERVE_FORWARD(stream_destroy, (StreamId stream), stream)
  WARMSERVE_FORWARD(stream_synchronize, (StreamId stream), stream)
  WARMSERVE_FORWARD(stream_capturing, (StreamId stream, bool* out), stream, out)
  WARMSERVE_FORWARD(device_synchronize, ())
  WARMSERVE_FORWARD(stream_wait_event, (StreamId stream, EventId event), stream, event)
  WARMSERVE_FORWARD(event_create, (EventId * out), out)
  WARMSERVE_FORWARD(event_destroy, (EventId event), event)
  WARMSERVE_FORWARD(event_record, (EventId event, StreamId stream), event, stream)
  WARMSERVE_FORWARD(event_query, (EventId event), event)
  WARMSERVE_FORWARD(event_wait, (EventId event, std::chrono::microseconds timeout), event, timeout)
  WARMSERVE_FORWARD(copy_to_device,
                    (Address to, const std::byte* from, std::uint64_t bytes, StreamId stream), to,
                    from, bytes, stream)
  WARMSERVE_FORWARD(copy_from_device,
                    (std::byte * to, Address from, std::uint64_t bytes, StreamId stream), to, from,
                    bytes, stream)
  WARMSERVE_FORWARD(copy_to_peer, (Address to, Address from, std::uint64_t bytes, StreamId stream),
                    to, from, bytes, stream)
  WARMSERVE_FORWARD(fill_zero, (Address to, std::uint64_t bytes, StreamId stream), to, bytes,
                    stream)
  WARMSERVE_FORWARD(launch, (const KernelCall& call, StreamId stream), call, stream)
#undef WARMSERVE_FORWARD

 protected:
  // Called before each primitive of WARMSERVE_PRIMITIVES. A status other than ok is returned
  // instead of making the call.
  virtual Status before(Primitive) { return Status::ok; }

  const std::shared_ptr<Driver> inner_;
};

}  // namespace warmserve
