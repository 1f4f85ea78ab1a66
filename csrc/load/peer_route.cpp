#include "load/peer_route.h"

#include <algorithm>
#include <mutex>

namespace warmserve {
namespace {

// A piece of the peer's memory, and the stream that fills and empties it.
struct Slot {
  Slot(const DevicePtr& device, std::uint64_t bytes)
      : reservation(std::make_shared<Reservation>(device, bytes)),
        granule(device, bytes),
        mapping(reservation, 0, std::array{granule.handle()}, bytes),
        stream(device, StreamPriority::background),
        event(device) {
    mapping.set_access(Access::read_write);
  }
  Address address() const noexcept { return reservation->address(); }

  const ReservationPtr reservation;
  const Granule granule;
  Mapping mapping;
  Stream stream;
  Event event;
};

// The free slots. Kept alive by the route and by each route copy that uses a slot.
class Slots {
 public:
  Slots(const DevicePtr& device, std::uint64_t slot_bytes, unsigned count) {
    const std::uint64_t granularity = device->facts().granularity;
    const std::uint64_t bytes = ceil_div(slot_bytes, granularity) * granularity;
    for (unsigned i = 0; i < count; ++i) free_.push_back(std::make_unique<Slot>(device, bytes));
  }
  std::unique_ptr<Slot> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return nullptr;
    std::unique_ptr<Slot> slot = std::move(free_.back());
    free_.pop_back();
    return slot;
  }
  void give(std::unique_ptr<Slot> slot) noexcept {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(slot));  // within its capacity, so it does not allocate
  }

 private:
  std::mutex mutex_;  // a leaf
  std::vector<std::unique_ptr<Slot>> free_;
};

class PeerRouteCopy final : public RouteCopy {
 public:
  PeerRouteCopy(std::shared_ptr<Slots> slots, std::unique_ptr<Slot> slot)
      : slots_(std::move(slots)), slot_(std::move(slot)) {}
  ~PeerRouteCopy() override { slots_->give(std::move(slot_)); }

  // Throws if it enqueued no copy. poll() reports later errors.
  void begin(std::span<const Copy> copies) {
    bool under_way = false;
    try {
      Address bounce = slot_->address();
      for (const Copy& copy : copies) {
        slot_->stream.copy_to_device(bounce, copy.from, copy.bytes);
        under_way = true;
        slot_->stream.copy_to_peer(copy.to, bounce, copy.bytes);
        bounce += copy.bytes;
      }
      slot_->event.record(slot_->stream.id());
    } catch (const Error& error) {
      if (!under_way) throw;
      cut_short_ = error.what();
    }
  }

  State poll(Deadline until, std::string* why) noexcept override {
    try {
      *why = cut_short_;
      if (cut_short_.empty()) {
        if (slot_->event.complete()) return State::arrived;
        if (until <= Clock::now()) return State::moving;
        slot_->event.wait(until, nullptr);
        return State::arrived;
      }
    } catch (const Error& error) {
      if (error.kind() == ErrorKind::timeout) return State::moving;
      *why = error.what();
      if (error.kind() == ErrorKind::device_lost) return State::failed;
    }
    return await_stream(until, why);
  }

 private:
  // Waits for the stream, if the event cannot tell whether the copies are over. A lost device no
  // longer reads or writes, so its copies count as over.
  State await_stream(Deadline until, std::string* why) noexcept {
    if (until <= Clock::now()) return State::moving;
    try {
      slot_->stream.synchronize();
      return State::failed;
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::device_lost) return State::moving;
      *why = error.what();
      return State::failed;
    }
  }

  const std::shared_ptr<Slots> slots_;
  std::unique_ptr<Slot> slot_;
  std::string cut_short_;  // why only some copies were enqueued; set before the first poll()
};

class PeerRoute final : public Route {
 public:
  PeerRoute(const DevicePtr& peer, std::uint64_t slot_bytes, unsigned slots)
      : name_(peer->facts().name), slots_(std::make_shared<Slots>(peer, slot_bytes, slots)) {}

  const std::string& name() const noexcept override { return name_; }

  std::shared_ptr<RouteCopy> begin(std::span<const Copy> copies) override {
    std::unique_ptr<Slot> slot = slots_->take();
    if (!slot) return nullptr;
    const auto route_copy = std::make_shared<PeerRouteCopy>(slots_, std::move(slot));
    route_copy->begin(copies);
    return route_copy;
  }

 private:
  const std::string name_;
  const std::shared_ptr<Slots> slots_;
};

void require_reach(const Device& peer, const Device& device) {
  const DeviceFacts& to = device.facts();
  const int from = peer.facts().cuda_ordinal;
  const bool reaches = to.cuda_ordinal < 0
                           ? from < 0
                           : std::find(to.peers.begin(), to.peers.end(), from) != to.peers.end();
  if (!reaches)
    throw Error(ErrorKind::invalid_argument,
                peer.facts().name + " has no access to the memory of " + to.name +
                    ": list its ordinal in the peers of that device's driver");
}

}  // namespace

RoutePtr make_peer_route(const DevicePtr& peer, const Device& device, std::uint64_t slot_bytes,
                         unsigned slots) {
  require_reach(*peer, device);
  return std::make_shared<PeerRoute>(peer, slot_bytes, slots);
}

}  // namespace warmserve
