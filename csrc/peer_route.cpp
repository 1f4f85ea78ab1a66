#include "peer_route.h"

#include <algorithm>
#include <mutex>

namespace warmserve {
namespace {

struct Slot {
  Slot(const DevicePtr& device, Address at)
      : bounce(at), stream(device, StreamPriority::background), event(device) {}
  const Address bounce;
  Stream stream;
  Event event;
};

// Slots that are free; outlives the route while a crossing has one.
class Slots {
 public:
  Slots(const DevicePtr& device, std::uint64_t slot_bytes, unsigned count)
      : reservation_(std::make_shared<Reservation>(
            device, ceil_div(slot_bytes * count, device->facts().granularity) *
                        device->facts().granularity)),
        granule_(device, reservation_->bytes()),
        mapping_(reservation_, 0, handles(granule_), reservation_->bytes()) {
    mapping_.set_access(Access::read_write);
    for (unsigned i = 0; i < count; ++i)
      free_.push_back(std::make_unique<Slot>(device, reservation_->address() + i * slot_bytes));
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
    free_.push_back(std::move(slot));  // never more than there were
  }

 private:
  static std::array<Handle, 1> handles(const Granule& granule) { return {granule.handle()}; }

  const ReservationPtr reservation_;
  const Granule granule_;
  Mapping mapping_;
  std::mutex mutex_;  // a leaf
  std::vector<std::unique_ptr<Slot>> free_;
};

class PeerCrossing final : public Crossing {
 public:
  PeerCrossing(std::shared_ptr<Slots> slots, std::unique_ptr<Slot> slot)
      : slots_(std::move(slots)), slot_(std::move(slot)) {}
  ~PeerCrossing() override { slots_->give(std::move(slot_)); }

  // Whether any copy is under way. Errors after the first are the crossing's.
  bool begin(std::span<const Copy> copies) {
    bool under_way = false;
    try {
      Address bounce = slot_->bounce;
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
    return under_way;
  }

  State look(Deadline until, std::string* why) noexcept override {
    try {
      if (cut_short_.empty()) {
        if (slot_->event.complete()) return State::arrived;
        if (until <= Clock::now()) return State::moving;
        slot_->event.wait(until, nullptr);
        return State::arrived;
      }
      // There is nothing to ask but the stream.
      if (until <= Clock::now()) return State::moving;
      slot_->stream.synchronize();
      *why = cut_short_;
      return State::failed;
    } catch (const Error& error) {
      if (error.kind() == ErrorKind::timeout) return State::moving;
      *why = error.what();
      // A device that is lost reads and writes no more; of another only its stream can tell.
      if (error.kind() == ErrorKind::device_lost) return State::failed;
    }
    return settle(until, why);
  }

 private:
  State settle(Deadline until, std::string* why) noexcept {
    if (until <= Clock::now()) return State::moving;
    try {
      slot_->stream.synchronize();
      return State::failed;
    } catch (const Error& error) {
      *why = error.what();
      return error.kind() == ErrorKind::device_lost ? State::failed : State::moving;
    }
  }

  const std::shared_ptr<Slots> slots_;
  std::unique_ptr<Slot> slot_;
  std::string cut_short_;  // why not all was enqueued; set before anybody looks
};

class PeerRoute final : public Route {
 public:
  PeerRoute(const DevicePtr& neighbour, std::uint64_t slot_bytes, unsigned slots)
      : name_(neighbour->facts().name),
        slots_(std::make_shared<Slots>(neighbour, slot_bytes, slots)) {}

  const std::string& name() const noexcept override { return name_; }

  std::shared_ptr<Crossing> begin(std::span<const Copy> copies) override {
    std::unique_ptr<Slot> slot = slots_->take();
    if (!slot) return nullptr;
    const auto crossing = std::make_shared<PeerCrossing>(slots_, std::move(slot));
    crossing->begin(copies);
    return crossing;
  }

 private:
  const std::string name_;
  const std::shared_ptr<Slots> slots_;
};

void require_reach(const Device& neighbour, const Device& device) {
  const DeviceFacts& to = device.facts();
  const int from = neighbour.facts().cuda_ordinal;
  const bool reaches = to.cuda_ordinal < 0
                           ? from < 0
                           : std::find(to.peers.begin(), to.peers.end(), from) != to.peers.end();
  if (!reaches)
    throw Error(ErrorKind::invalid_argument,
                neighbour.facts().name + " was not let in at " + to.name +
                    ": name it among the peers of the driver that opens it");
}

}  // namespace

RoutePtr make_peer_route(const DevicePtr& neighbour, const Device& device, std::uint64_t slot_bytes,
                         unsigned slots) {
  require_reach(*neighbour, device);
  return std::make_shared<PeerRoute>(neighbour, slot_bytes, slots);
}

}  // namespace warmserve
