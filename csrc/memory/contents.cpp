#include "memory/contents.h"

#include "base/error.h"
#include "base/random_number.h"

namespace warmserve {
namespace {

constexpr std::uint64_t kFormat = 0x77736d656d000001;  // changes with the layout of the file

}  // namespace

struct Contents::Header {
  std::atomic<std::uint64_t> format;  // written last; 0: the record is empty
  std::uint64_t granules, granule_bytes, arena_id;
};

// One granule. `part` is written last: its index among the granules of the layer plus 1, and their
// count in the upper half. 0: no record.
struct Contents::Entry {
  std::uint64_t key[2];
  std::atomic<std::uint64_t> part;
};

std::uint64_t Contents::bytes_for(std::uint32_t granules) noexcept {
  return sizeof(Header) + granules * sizeof(Entry);
}

Contents::Contents(int descriptor, std::uint32_t granules, std::uint64_t granule_bytes)
    : mapping_(descriptor, bytes_for(granules), "the contents record of the arena"),
      header_(static_cast<Header*>(mapping_.data())),
      entries_(reinterpret_cast<Entry*>(header_ + 1)),
      keys_(granules) {
  if (header_->format == 0) {
    header_->granules = granules;
    header_->granule_bytes = granule_bytes;
    header_->arena_id = random_number();
    header_->format = kFormat;
  } else if (header_->format != kFormat || header_->granules != granules ||
             header_->granule_bytes != granule_bytes) {
    throw Error(ErrorKind::general,
                "the contents record is of an arena of other granules, or of another version");
  }
  read_entries();
}

std::uint64_t Contents::arena_id() const noexcept { return header_->arena_id; }

// Finds the layers whose granules all have an entry, and clears the other entries.
void Contents::read_entries() {
  constexpr GranuleId kMissing = UINT32_MAX;
  for (GranuleId id = 0; id < keys_.size(); ++id) {
    Entry& entry = entries_[id];
    const std::uint64_t part = entry.part, index = (part & UINT32_MAX) - 1, count = part >> 32;
    if (!part) continue;
    const ContentKey key{{entry.key[0], entry.key[1]}};
    std::vector<GranuleId>& ids = layers_[key];
    if (ids.empty() && count <= keys_.size()) ids.resize(count, kMissing);
    if (index >= count || count != ids.size() || ids[index] != kMissing) {
      entry.part = 0;
      continue;
    }
    ids[index] = id;
    keys_[id] = key;
  }
  std::erase_if(layers_, [&](const auto& layer) {
    bool whole = static_cast<bool>(layer.first) && !layer.second.empty();
    for (const GranuleId id : layer.second) whole &= id != kMissing;
    for (const GranuleId id : layer.second) {
      if (whole || id == kMissing) continue;
      entries_[id].part = 0;
      keys_[id] = {};
    }
    return !whole;
  });
}

const std::vector<GranuleId>* Contents::find(const ContentKey& key) const {
  const auto found = layers_.find(key);
  return found == layers_.end() ? nullptr : &found->second;
}

void Contents::record(const ContentKey& key, std::span<const GranuleId> ids) {
  if (!key || ids.empty()) return;
  for (const GranuleId id : ids) erase(id);
  if (const auto* earlier = find(key)) erase(earlier->front());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Entry& entry = entries_[ids[i]];
    entry.key[0] = key.words[0];
    entry.key[1] = key.words[1];
    entry.part = (i + 1) | std::uint64_t{ids.size()} << 32;
    keys_[ids[i]] = key;
  }
  layers_[key].assign(ids.begin(), ids.end());
}

std::vector<GranuleId> Contents::erase(GranuleId id) {
  const auto found = layers_.find(keys_[id]);
  if (found == layers_.end()) return {};
  std::vector<GranuleId> ids = std::move(found->second);
  layers_.erase(found);
  for (const GranuleId each : ids) {
    entries_[each].part = 0;
    keys_[each] = {};
  }
  return ids;
}

}  // namespace warmserve
