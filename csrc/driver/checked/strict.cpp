// StrictDriver: its records, and the calls that change what exists or what is ordered.
#include "driver/checked/strict.h"

#include <algorithm>

#include "base/lock_mark.h"

namespace warmserve {

using Guard = std::lock_guard<std::mutex>;

std::vector<std::string> StrictDriver::violations() const {
  std::vector<std::string> all;
  {
    const Guard guard(marked_mutex_);
    for (const std::string& call : marked_) all.push_back(call + " under the runtime's lock");
  }
  const Guard guard(mutex_);
  all.insert(all.end(), violations_.begin(), violations_.end());
  return all;
}

std::map<std::string, std::size_t> StrictDriver::live() const {
  const Guard guard(mutex_);
  return {{"granules", granules_.size()},
          {"reservations", reservations_.size()},
          {"mappings", mappings_.size()},
          {"pinned", pinned_.size()},
          {"streams", streams_.size() - adopted_.size()},
          {"events", events_.size()}};
}

Status StrictDriver::before(Primitive primitive) { return check_mark(to_string(primitive)); }

// Callable with and without mutex_.
Status StrictDriver::check_mark(const char* call) {
  if (!LockMark::held()) return Status::ok;
  const Guard guard(marked_mutex_);
  marked_.insert(call);
  return Status::invalid;
}

Status StrictDriver::violation(const std::string& what) {
  violations_.push_back(what);
  return Status::invalid;
}

// Returns the mappings that make up exactly this range; nullopt if the range cuts a mapping or has
// a hole.
std::optional<std::pair<StrictDriver::Mappings::iterator, StrictDriver::Mappings::iterator>>
StrictDriver::whole(Address address, std::uint64_t bytes) {
  const auto first = mappings_.find(address);
  auto last = first;
  Address end = address;
  while (last != mappings_.end() && last->first == end && end < address + bytes) {
    end += last->second.bytes;
    ++last;
  }
  if (bytes == 0 || first == mappings_.end() || end != address + bytes) return std::nullopt;
  return std::pair(first, last);
}

void StrictDriver::join(VectorClock& into, const VectorClock& from) {
  for (const auto& [agent, time] : from) into[agent] = std::max(into[agent], time);
}

// Returns whether all uses by agents other than `by` happened before `before`.
bool StrictDriver::ordered(const VectorClock& uses, const VectorClock& before, Agent by) {
  return std::all_of(uses.begin(), uses.end(), [&](const auto& use) {
    const auto known = before.find(use.first);
    return use.first == by || (known != before.end() && known->second >= use.second);
  });
}

bool StrictDriver::quiet(const GranuleState& granule) const {
  return ordered(granule.reads, host_, 0) && ordered(granule.writes, host_, 0);
}

void StrictDriver::forget_if_dead(Handle handle) {
  const auto granule = granules_.find(handle);
  if (granule->second.released && granule->second.mappings == 0) granules_.erase(granule);
}

Status StrictDriver::memory(std::uint64_t* available, std::uint64_t* total) {
  const Status marked = check_mark("memory");
  return marked == Status::ok ? Interposer::memory(available, total) : marked;
}

Status StrictDriver::granule_create(std::uint64_t bytes, Handle* out) {
  const Guard guard(mutex_);
  if (bytes == 0 || bytes % facts().granularity)
    return violation("granule_create of " + std::to_string(bytes) + " bytes");
  const Status status = Interposer::granule_create(bytes, out);
  if (status == Status::ok) granules_[*out].bytes = bytes;
  return status;
}

Status StrictDriver::granule_release(Handle handle) {
  const Guard guard(mutex_);
  const auto granule = granules_.find(handle);
  if (granule == granules_.end() || granule->second.released)
    return violation("granule_release of an unknown granule");
  if (!quiet(granule->second))
    return violation("granule_release before a use of the granule was waited for");
  const Status status = Interposer::granule_release(handle);
  if (status == Status::ok) {
    granule->second.released = true;
    forget_if_dead(handle);
  }
  return status;
}

Status StrictDriver::granule_export(Handle handle, SharedGranule* out) {
  const Guard guard(mutex_);
  const auto granule = granules_.find(handle);
  if (granule == granules_.end() || granule->second.released)
    return violation("granule_export of an unknown granule");
  if (granule->second.imported) return violation("granule_export of an imported granule");
  return Interposer::granule_export(handle, out);
}

// Bytes that the other process has not written cannot be told from bytes that it has.
Status StrictDriver::granule_import(const SharedGranule& shared, std::uint64_t bytes, Handle* out) {
  const Guard guard(mutex_);
  if (bytes == 0 || bytes % facts().granularity)
    return violation("granule_import of " + std::to_string(bytes) + " bytes");
  const Status status = Interposer::granule_import(shared, bytes, out);
  if (status != Status::ok) return status;
  GranuleState& granule = granules_[*out];
  granule.bytes = bytes;
  granule.imported = true;
  granule.written.add(0, bytes);
  return status;
}

void StrictDriver::host_wrote(Handle handle, std::uint64_t offset, std::uint64_t bytes) noexcept {
  const Guard guard(mutex_);
  const auto found = granules_.find(handle);
  if (found == granules_.end() || found->second.released || found->second.imported ||
      offset > found->second.bytes || bytes > found->second.bytes - offset) {
    violation("host_wrote outside of a granule that was created here");
    return;
  }
  GranuleState& granule = found->second;
  if (!quiet(granule)) violation("the host writes a granule that a stream still uses");
  granule.writes[0] = ++host_[0];
  granule.written.add(offset, offset + bytes);
  Interposer::host_wrote(handle, offset, bytes);
}

Status StrictDriver::address_reserve(std::uint64_t bytes, Address* out) {
  const Guard guard(mutex_);
  if (bytes == 0 || bytes % facts().granularity)
    return violation("address_reserve of " + std::to_string(bytes) + " bytes");
  const Status status = Interposer::address_reserve(bytes, out);
  if (status == Status::ok) reservations_[*out] = bytes;
  return status;
}

Status StrictDriver::address_free(Address address, std::uint64_t bytes) {
  const Guard guard(mutex_);
  const auto found = reservations_.find(address);
  if (found == reservations_.end() || found->second != bytes)
    return violation("address_free of a range that is not a reservation");
  const auto inside = mappings_.lower_bound(address);
  if (inside != mappings_.end() && inside->first < address + bytes)
    return violation("address_free of a reservation with mappings");
  const Status status = Interposer::address_free(address, bytes);
  if (status == Status::ok) reservations_.erase(found);
  return status;
}

Status StrictDriver::map(Address address, const Handle* handles, std::size_t count) {
  const Guard guard(mutex_);
  Address end = address;
  for (std::size_t i = 0; i < count; ++i) {
    const auto granule = granules_.find(handles[i]);
    if (granule == granules_.end() || granule->second.released)
      return violation("map of an unknown granule");
    end += granule->second.bytes;
  }
  auto reservation = reservations_.upper_bound(address);
  if (address % facts().granularity) return violation("map at an address that is not aligned");
  if (count == 0 || reservation == reservations_.begin() ||
      end > std::prev(reservation)->first + std::prev(reservation)->second)
    return violation("map outside of a reservation");
  const auto next = mappings_.lower_bound(address);
  if (next != mappings_.end() && next->first < end) return violation("map over a live mapping");
  if (next != mappings_.begin() && std::prev(next)->first + std::prev(next)->second.bytes > address)
    return violation("map over a live mapping");
  const Status status = Interposer::map(address, handles, count);
  if (status != Status::ok) return status;
  for (std::size_t i = 0; i < count; ++i) {
    GranuleState& granule = granules_[handles[i]];
    ++granule.mappings;
    mappings_[address] = {granule.bytes, handles[i], Access::none};
    address += granule.bytes;
  }
  return status;
}

Status StrictDriver::unmap(Address address, std::uint64_t bytes) {
  const Guard guard(mutex_);
  const auto range = whole(address, bytes);
  if (!range) return violation("unmap of a range that is not whole mappings");
  for (auto mapping = range->first; mapping != range->second; ++mapping)
    if (!quiet(granules_[mapping->second.granule]))
      return violation("unmap before a use was waited for");
  const Status status = Interposer::unmap(address, bytes);
  if (status != Status::ok) return status;
  for (auto mapping = range->first; mapping != range->second; ++mapping) {
    GranuleState& granule = granules_[mapping->second.granule];
    // The contents are void: only the window through which the granule is filled may still map it.
    if (--granule.mappings <= 1 && !granule.imported) granule.written.clear();
    forget_if_dead(mapping->second.granule);
  }
  mappings_.erase(range->first, range->second);
  return status;
}

Status StrictDriver::set_access(Address address, std::uint64_t bytes, Access access) {
  const Guard guard(mutex_);
  const auto range = whole(address, bytes);
  if (!range) return violation("set_access on a range that is not whole mappings");
  for (auto mapping = range->first; mapping != range->second; ++mapping) {
    if (mapping->second.access != Access::none) return violation("set_access a second time");
    if (access == Access::read_write && granules_[mapping->second.granule].imported)
      return violation("set_access of an imported granule to read_write");
  }
  const Status status = Interposer::set_access(address, bytes, access);
  if (status != Status::ok) return status;
  for (auto mapping = range->first; mapping != range->second; ++mapping)
    mapping->second.access = access;
  return status;
}

Status StrictDriver::pinned_create(std::uint64_t bytes, std::byte** out) {
  if (bytes == 0 || bytes % (4 * kKiB)) {
    const Guard guard(mutex_);
    return violation("pinned_create of " + std::to_string(bytes) + " bytes");
  }
  const Status status = Interposer::pinned_create(bytes, out);
  const Guard guard(mutex_);
  if (status == Status::ok) pinned_[*out] = {bytes, {}};
  return status;
}

Status StrictDriver::pinned_release(std::byte* address, std::uint64_t bytes) {
  const Guard guard(mutex_);
  const auto found = pinned_.find(address);
  if (found == pinned_.end() || found->second.bytes != bytes)
    return violation("pinned_release of a range that is not a pinned region");
  if (!ordered(found->second.uses, host_, 0))
    return violation("pinned_release before a use was waited for");
  const Status status = Interposer::pinned_release(address, bytes);
  if (status == Status::ok) pinned_.erase(found);
  return status;
}

Status StrictDriver::stream_create(StreamPriority priority, StreamId* out) {
  const Status status = Interposer::stream_create(priority, out);
  const Guard guard(mutex_);
  if (status == Status::ok) streams_[*out] = host_;
  return status;
}

// Earlier work of its owner is unknown here, so the stream is treated as new.
Status StrictDriver::stream_adopt(std::uint64_t handle, StreamId* out) {
  if (const Status marked = check_mark("stream_adopt"); marked != Status::ok) return marked;
  const Status status = Interposer::stream_adopt(handle, out);
  const Guard guard(mutex_);
  if (status == Status::ok && streams_.emplace(*out, host_).second) adopted_.insert(*out);
  return status;
}

Status StrictDriver::stream_step(StreamId stream) {
  if (facts().threads) {
    const Guard guard(mutex_);
    return violation("stream_step of a stream that runs by itself");
  }
  return Interposer::stream_step(stream);
}

Status StrictDriver::stream_destroy(StreamId stream) {
  {
    const Guard guard(mutex_);
    const auto found = streams_.find(stream);
    if (found == streams_.end()) return violation("stream_destroy of an unknown stream");
    if (!ordered(found->second, host_, 0))
      return violation("stream_destroy before its work was waited for");
  }
  const Status status = Interposer::stream_destroy(stream);
  const Guard guard(mutex_);
  if (status == Status::ok) streams_.erase(stream);
  return status;
}

Status StrictDriver::stream_synchronize(StreamId stream) {
  VectorClock clock;
  {
    const Guard guard(mutex_);
    const auto found = streams_.find(stream);
    if (found == streams_.end()) return violation("stream_synchronize of an unknown stream");
    clock = found->second;  // the call need not wait for later work
  }
  const Status status = Interposer::stream_synchronize(stream);
  const Guard guard(mutex_);
  if (status == Status::ok) join(host_, clock);
  return status;
}

Status StrictDriver::stream_capturing(StreamId stream, bool* out) {
  {
    const Guard guard(mutex_);
    if (!streams_.contains(stream)) return violation("stream_capturing of an unknown stream");
  }
  return Interposer::stream_capturing(stream, out);
}

Status StrictDriver::device_synchronize() {
  VectorClock clock;
  {
    const Guard guard(mutex_);
    for (const auto& [stream, known] : streams_) join(clock, known);
  }
  const Status status = Interposer::device_synchronize();
  const Guard guard(mutex_);
  if (status == Status::ok) join(host_, clock);
  return status;
}

Status StrictDriver::stream_wait_event(StreamId stream, EventId event) {
  const Guard guard(mutex_);
  if (!streams_.contains(stream) || !events_.contains(event))
    return violation("stream_wait_event with an unknown stream or event");
  const Status status = Interposer::stream_wait_event(stream, event);
  if (status == Status::ok && events_[event]) join(streams_[stream], *events_[event]);
  return status;
}

Status StrictDriver::event_create(EventId* out) {
  const Guard guard(mutex_);
  const Status status = Interposer::event_create(out);
  if (status == Status::ok) events_[*out] = std::nullopt;
  return status;
}

Status StrictDriver::event_destroy(EventId event) {
  const Guard guard(mutex_);
  if (!events_.contains(event)) return violation("event_destroy of an unknown event");
  const Status status = Interposer::event_destroy(event);
  if (status == Status::ok) events_.erase(event);
  return status;
}

Status StrictDriver::event_record(EventId event, StreamId stream) {
  const Guard guard(mutex_);
  if (!streams_.contains(stream) || !events_.contains(event))
    return violation("event_record with an unknown event or stream");
  const Status status = Interposer::event_record(event, stream);
  if (status == Status::ok) events_[event] = streams_[stream];
  return status;
}

Status StrictDriver::event_query(EventId event) {
  const Guard guard(mutex_);
  if (!events_.contains(event)) return violation("event_query of an unknown event");
  const Status status = Interposer::event_query(event);
  if (status == Status::ok && events_[event]) join(host_, *events_[event]);
  return status;
}

Status StrictDriver::event_wait(EventId event, std::chrono::microseconds timeout) {
  std::optional<VectorClock> clock;
  {
    const Guard guard(mutex_);
    if (!events_.contains(event)) return violation("event_wait for an unknown event");
    clock = events_[event];  // a recording made during the wait does not count
  }
  const Status status = Interposer::event_wait(event, timeout);
  const Guard guard(mutex_);
  if (status == Status::ok && clock) join(host_, *clock);
  return status;
}

}  // namespace warmserve
