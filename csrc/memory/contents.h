// The contents record of an arena: which granules contain which layer. The record lies in memory
// that outlives the process.
//
// When a broker dies, the keeper gives the arena's memory and this record to another process, which
// need not load recorded layers again.
//
// A layer is recorded after its last byte was written. The record ends before the first byte of one
// of its granules is overwritten. So whenever the process dies, recorded granules contain what the
// record says. A layer of which only some granules are recorded counts as not recorded.
#pragma once

#include <array>
#include <atomic>
#include <compare>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/shared_mapping.h"
#include "base/types.h"

namespace warmserve {

// Identifies the bytes of a layer: two layers with the same key have the same bytes. Zero: of no
// layer.
struct ContentKey {
  std::array<std::uint64_t, 2> words{};
  auto operator<=>(const ContentKey&) const = default;
  explicit operator bool() const noexcept { return *this != ContentKey(); }
};

// Used under the runtime's lock.
class Contents {
 public:
  // Maps the record in a file of at least bytes_for(granules), and starts a new record if the file
  // is empty. The descriptor stays the caller's. Throws general if the file cannot be mapped, or if
  // the record is of other granules.
  Contents(int descriptor, std::uint32_t granules, std::uint64_t granule_bytes);

  static std::uint64_t bytes_for(std::uint32_t granules) noexcept;

  // A random number that the arena keeps, other than 0.
  std::uint64_t arena_id() const noexcept;
  // Returns the granules of a recorded layer, in the order of its bytes; null if it has no record.
  const std::vector<GranuleId>* find(const ContentKey& key) const;
  // Returns whether the granule belongs to a recorded layer.
  bool recorded(GranuleId id) const noexcept { return static_cast<bool>(keys_[id]); }
  // Records a layer, whose bytes are in place. Ends records of its granules and an earlier one of
  // the layer.
  void record(const ContentKey& key, std::span<const GranuleId> ids);
  // Ends the record of the layer to which the granule belongs, if any. Returns the layer's
  // granules.
  std::vector<GranuleId> erase(GranuleId id);

 private:
  struct Header;
  struct Entry;
  void read_entries();

  SharedMapping mapping_;
  Header* const header_;  // in the mapping, like the entries behind it
  Entry* const entries_;
  struct Hash {
    std::size_t operator()(const ContentKey& key) const noexcept { return key.words[0]; }
  };
  std::unordered_map<ContentKey, std::vector<GranuleId>, Hash> layers_;
  std::vector<ContentKey> keys_;  // by granule
};

}  // namespace warmserve
