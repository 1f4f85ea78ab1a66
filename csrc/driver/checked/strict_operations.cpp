// StrictDriver: copies and kernels, checked against the page table and the vector clocks.
#include <algorithm>

#include "driver/checked/strict.h"

namespace warmserve {

using Guard = std::lock_guard<std::mutex>;

// Checks every range that an operation touches against the page table, then enqueues the operation.
// The lock is held.
Status StrictDriver::use(const std::string& name, std::span<const Touched> ranges, StreamId stream,
                         const std::function<Status()>& enqueue) {
  const auto clock = streams_.find(stream);
  if (clock == streams_.end()) return violation(name + " on an unknown stream");
  const auto agent = static_cast<Agent>(stream);
  VectorClock now = clock->second;
  join(now, host_);
  now[agent] += 1;
  struct Piece {
    GranuleState* granule;
    std::uint64_t begin, end;
    bool write;
  };
  std::vector<Piece> pieces;
  std::vector<PinnedState*> regions;
  for (const Touched& range : ranges) {
    if (PinnedState* region = pinned_at(range.address)) {
      regions.push_back(region);
      continue;
    }
    for (Address at = range.address; at < range.address + range.bytes;) {
      auto mapping = mappings_.upper_bound(at);
      if (mapping == mappings_.begin() || (--mapping)->first + mapping->second.bytes <= at)
        return violation(name + " at an unmapped address");
      const Access access = mapping->second.access;
      if (access == Access::none || (range.write && access == Access::read))
        return violation(name + " without access");
      GranuleState& granule = granules_[mapping->second.granule];
      const std::uint64_t begin = at - mapping->first;
      const std::uint64_t end =
          std::min(mapping->second.bytes, range.address + range.bytes - mapping->first);
      if (!range.write && !granule.written.covers(begin, end))
        return violation(name + " before fill");
      if (!ordered(granule.writes, now, agent) ||
          (range.write && !ordered(granule.reads, now, agent)))
        return violation(name + " races with another use");
      pieces.push_back({&granule, begin, end, range.write});
      at = mapping->first + end;
    }
  }
  if (const Status status = enqueue(); status != Status::ok) return status;
  for (const Piece& piece : pieces) {
    if (piece.write) piece.granule->written.add(piece.begin, piece.end);
    (piece.write ? piece.granule->writes : piece.granule->reads)[agent] = now[agent];
  }
  for (PinnedState* region : regions) region->uses[agent] = now[agent];
  clock->second = std::move(now);
  return Status::ok;
}

StrictDriver::PinnedState* StrictDriver::pinned_at(Address address) {
  auto region = pinned_.upper_bound(reinterpret_cast<const std::byte*>(address));
  if (region == pinned_.begin()) return nullptr;
  --region;
  const auto begin = reinterpret_cast<Address>(region->first);
  return address < begin + region->second.bytes ? &region->second : nullptr;
}

std::vector<Touched> StrictDriver::touched_by_copy(Address address, const std::byte* host,
                                                   std::uint64_t bytes, bool write) {
  std::vector<Touched> ranges{{address, bytes, write}};
  const auto memory = reinterpret_cast<Address>(host);
  if (pinned_at(memory)) ranges.push_back({memory, bytes, !write});
  return ranges;
}

Status StrictDriver::copy_to_device(Address to, const std::byte* from, std::uint64_t bytes,
                                    StreamId stream) {
  const Guard guard(mutex_);
  return use("copy_to_device", touched_by_copy(to, from, bytes, true), stream,
             [&] { return Interposer::copy_to_device(to, from, bytes, stream); });
}

Status StrictDriver::copy_from_device(std::byte* to, Address from, std::uint64_t bytes,
                                      StreamId stream) {
  const Guard guard(mutex_);
  return use("copy_from_device", touched_by_copy(from, to, bytes, false), stream,
             [&] { return Interposer::copy_from_device(to, from, bytes, stream); });
}

// Checks only the read. The other device's StrictDriver learns of the write from peer_wrote.
Status StrictDriver::copy_to_peer(Address to, Address from, std::uint64_t bytes, StreamId stream) {
  const Guard guard(mutex_);
  return use("copy_to_peer", std::vector<Touched>{{from, bytes, false}}, stream,
             [&] { return Interposer::copy_to_peer(to, from, bytes, stream); });
}

Status StrictDriver::fill_zero(Address to, std::uint64_t bytes, StreamId stream) {
  const Guard guard(mutex_);
  return use("fill_zero", std::vector<Touched>{{to, bytes, true}}, stream,
             [&] { return Interposer::fill_zero(to, bytes, stream); });
}

// Does not require the whole granule to be quiet: this device's streams may use other bytes of it.
void StrictDriver::peer_wrote(Address address, std::uint64_t bytes) noexcept {
  const Guard guard(mutex_);
  const std::uint64_t now = ++host_[0];
  for (Address at = address; at < address + bytes;) {
    auto mapping = mappings_.upper_bound(at);
    if (mapping == mappings_.begin() || (--mapping)->first + mapping->second.bytes <= at ||
        mapping->second.access != Access::read_write) {
      violation("peer_wrote at an address that a peer cannot write");
      return;
    }
    GranuleState& granule = granules_[mapping->second.granule];
    const std::uint64_t begin = at - mapping->first;
    const std::uint64_t end = std::min(mapping->second.bytes, address + bytes - mapping->first);
    granule.writes[0] = now;
    granule.written.add(begin, end);
    at = mapping->first + end;
  }
  Interposer::peer_wrote(address, bytes);
}

Status StrictDriver::launch(const KernelCall& call, StreamId stream) {
  const Guard guard(mutex_);
  if (const Misuse wrong = misuse(call); wrong != Misuse::none)
    return violation(std::string("launch: ") + text_of(wrong));
  return use(std::string("launch of ") + kernel_symbol(call), touched(call), stream,
             [&] { return Interposer::launch(call, stream); });
}

}  // namespace warmserve
