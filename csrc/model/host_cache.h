// The host cache: layers' bytes in pinned host memory, so that a load reads no file.
//
// An image has the layer's bytes in the layer's layout, cast. A load of a layer without an image
// reads the files into a new one and copies from there; when its bytes are complete, the image is
// kept. Images are evicted by keep value, then by last use, and never while a load or a copy uses
// them. All functions are called under the runtime's lock and are wait-free.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_set>

#include "memory/host_slabs.h"
#include "model/state.h"

namespace warmserve {

struct HostImage {
  explicit HostImage(HostSlabs::Units lent) : units(std::move(lent)) {}

  static std::uint64_t bytes_for(const Layer& layer) {
    return ceil_div(layer.bytes, HostSlabs::kUnitBytes) * HostSlabs::kUnitBytes;
  }
  // Returns the memory of layer bytes [begin, end), in whole units.
  Destination memory(std::uint64_t begin, std::uint64_t end) const {
    const std::uint64_t first = begin / HostSlabs::kUnitBytes;
    const auto block = [&](std::uint64_t unit) {
      return units.blocks().begin() + static_cast<std::ptrdiff_t>(unit);
    };
    return {first * HostSlabs::kUnitBytes,
            HostSlabs::kUnitBytes,
            {block(first), block(ceil_div(end, HostSlabs::kUnitBytes))}};
  }
  // Returns the slabs of those units.
  std::span<const std::uint32_t> slabs(std::uint64_t begin) const {
    return std::span(units.slabs()).subspan(begin / HostSlabs::kUnitBytes);
  }

  HostSlabs::Units units;
  std::uint64_t last_use = 0;  // the runtime's logical clock
};
using HostImagePtr = std::shared_ptr<HostImage>;

class HostCache {
 public:
  struct Counters {
    std::uint64_t hits = 0, misses = 0;  // loads of a layer
    std::uint64_t hit_bytes = 0;         // of the layers
    std::uint64_t evictions = 0;
  };

  HostCache(SharedState& state, HostSlabs& slabs) : state_(state), slabs_(slabs) {}

  // Returns the layer's image, or null. Counts a hit or a miss.
  HostImagePtr find(const Lock&, Layer& layer);
  // Returns memory for a new image of the layer, or null if images that are used or of a higher
  // keep value take the room; then it evicts none.
  HostImagePtr make(const Lock&, const Layer& layer);
  // Returns whether make() may succeed later without an eviction by keep value: memory is still
  // being pinned, or images that no layer has are in use.
  bool room_is_coming(const Lock&) const;
  // Keeps an image that has all of the layer's bytes, unless its model is unregistered.
  void keep(const Lock&, Layer& layer, HostImagePtr image);
  // Forgets the images of a model, whose files are replaced or which is unregistered.
  void drop(const Lock&, Model& model);
  // Forgets all images.
  void clear(const Lock&);

  Counters counters(const Lock&) const { return counters_; }
  std::size_t images(const Lock&) const { return cached_.size(); }
  void check_invariants(const Lock&) const;

 private:
  bool make_room(const Layer& layer, std::size_t units);
  void forget(Layer& layer);

  SharedState& state_;
  HostSlabs& slabs_;
  Counters counters_;
  std::unordered_set<Layer*> cached_;  // the layers with an image
};

}  // namespace warmserve
