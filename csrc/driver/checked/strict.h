// Checks that callers keep the contracts of driver.h, even if the driver below is more lenient.
//
// It keeps a page table of its own, which tells what each call and each copy touches, and vector
// clocks over streams and events, which tell what is ordered before what, independently of the
// timing. The host is one agent beside the streams; ThreadSanitizer checks the order among its
// threads. A call that breaks a contract is recorded, does not reach the driver, and returns
// Status::invalid.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "driver/checked/byte_ranges.h"
#include "driver/checked/interposer.h"

namespace warmserve {

class StrictDriver final : public Interposer {
 public:
  using Interposer::Interposer;

  // Returns the violations so far, a sentence each.
  std::vector<std::string> violations() const;
  // Returns the number of live objects by kind; all are zero once their owners are destroyed.
  std::map<std::string, std::size_t> live() const;

  Status memory(std::uint64_t* available, std::uint64_t* total) override;
  Status granule_create(std::uint64_t bytes, Handle* out) override;
  Status granule_release(Handle handle) override;
  Status granule_export(Handle handle, SharedGranule* out) override;
  Status granule_import(const SharedGranule& shared, std::uint64_t bytes, Handle* out) override;
  void host_wrote(Handle handle, std::uint64_t offset, std::uint64_t bytes) noexcept override;
  Status address_reserve(std::uint64_t bytes, Address* out) override;
  Status address_free(Address address, std::uint64_t bytes) override;
  Status map(Address address, const Handle* handles, std::size_t count) override;
  Status unmap(Address address, std::uint64_t bytes) override;
  Status set_access(Address address, std::uint64_t bytes, Access access) override;
  Status pinned_create(std::uint64_t bytes, std::byte** out) override;
  Status pinned_release(std::byte* address, std::uint64_t bytes) override;
  Status stream_create(StreamPriority priority, StreamId* out) override;
  Status stream_adopt(std::uint64_t handle, StreamId* out) override;
  Status stream_step(StreamId stream) override;
  Status stream_destroy(StreamId stream) override;
  Status stream_synchronize(StreamId stream) override;
  Status stream_capturing(StreamId stream, bool* out) override;
  Status device_synchronize() override;
  Status stream_wait_event(StreamId stream, EventId event) override;
  Status event_create(EventId* out) override;
  Status event_destroy(EventId event) override;
  Status event_record(EventId event, StreamId stream) override;
  Status event_query(EventId event) override;
  Status event_wait(EventId event, std::chrono::microseconds timeout) override;
  Status copy_to_device(Address to, const std::byte* from, std::uint64_t bytes,
                        StreamId stream) override;
  Status copy_from_device(std::byte* to, Address from, std::uint64_t bytes,
                          StreamId stream) override;
  Status copy_to_peer(Address to, Address from, std::uint64_t bytes, StreamId stream) override;
  Status fill_zero(Address to, std::uint64_t bytes, StreamId stream) override;
  void peer_wrote(Address address, std::uint64_t bytes) noexcept override;
  Status launch(const KernelCall& call, StreamId stream) override;

 private:
  using Agent = std::uint64_t;  // a StreamId; 0 is the host
  using VectorClock = std::map<Agent, std::uint64_t>;
  struct GranuleState {
    std::uint64_t bytes = 0;
    bool imported = false, released = false;
    std::size_t mappings = 0;
    VectorClock reads, writes;  // the last one of each agent
    ByteRanges written;         // since the current user mapped it; all bytes if imported
  };
  struct MappingState {
    std::uint64_t bytes = 0;
    Handle granule = Handle::none;
    Access access = Access::none;
  };
  struct PinnedState {
    std::uint64_t bytes = 0;
    VectorClock uses;  // the last one of each stream
  };
  using Mappings = std::map<Address, MappingState>;

  Status before(Primitive primitive) override;
  Status check_mark(const char* call);
  Status violation(const std::string& what);
  std::optional<std::pair<Mappings::iterator, Mappings::iterator>> whole(Address address,
                                                                         std::uint64_t bytes);
  static void join(VectorClock& into, const VectorClock& from);
  static bool ordered(const VectorClock& uses, const VectorClock& before, Agent by);
  bool quiet(const GranuleState& granule) const;
  void forget_if_dead(Handle handle);
  PinnedState* pinned_at(Address address);
  Status use(const std::string& name, std::span<const Touched> ranges, StreamId stream,
             const std::function<Status()>& enqueue);
  std::vector<Touched> touched_by_copy(Address address, const std::byte* host, std::uint64_t bytes,
                                       bool write);

  mutable std::mutex marked_mutex_;  // guards marked_; a leaf
  std::set<std::string> marked_;     // calls that were made under the runtime's lock
  mutable std::mutex mutex_;         // guards all below; held over inner calls that do not block
  std::vector<std::string> violations_;
  std::map<Handle, GranuleState> granules_;
  std::map<Address, std::uint64_t> reservations_;
  Mappings mappings_;
  std::map<const std::byte*, PinnedState> pinned_;
  std::map<StreamId, VectorClock> streams_;
  std::set<StreamId> adopted_;  // a subset of streams_
  std::map<EventId, std::optional<VectorClock>> events_;
  VectorClock host_{{0, 1}};
};

}  // namespace warmserve
