#include "model/host_cache.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace warmserve {

HostImagePtr HostCache::find(const Lock&, Layer& layer) {
  if (!slabs_.enabled() || !layer.bytes) return nullptr;
  if (!layer.image) {
    ++counters_.misses;
    return nullptr;
  }
  ++counters_.hits;
  counters_.hit_bytes += layer.bytes;
  layer.image->last_use = ++state_.clock;
  return layer.image;
}

HostImagePtr HostCache::make(const Lock&, const Layer& layer) {
  if (!slabs_.enabled() || !layer.bytes) return nullptr;
  const auto units = static_cast<std::size_t>(ceil_div(layer.bytes, HostSlabs::kUnitBytes));
  if (!make_room(layer, units)) return nullptr;
  std::optional<HostSlabs::Units> lent = slabs_.take(units);
  return lent ? std::make_shared<HostImage>(std::move(*lent)) : nullptr;
}

// Evicts images until `units` are free. Returns false, and evicts none, if that is impossible.
bool HostCache::make_room(const Layer& layer, std::size_t units) {
  std::size_t have = slabs_.free_units();
  if (units <= have) return true;
  if (slabs_.growing()) return false;  // memory is still being pinned
  std::vector<Layer*> order;
  for (Layer* other : cached_)
    if (other->image.use_count() == 1 && other->keep_value <= layer.keep_value)
      order.push_back(other);
  std::sort(order.begin(), order.end(), [](const Layer* a, const Layer* b) {
    return std::tie(a->keep_value, a->image->last_use) <
           std::tie(b->keep_value, b->image->last_use);
  });
  std::size_t count = 0;
  while (have < units && count < order.size()) have += order[count++]->image->units.blocks().size();
  if (have < units) return false;
  for (std::size_t i = 0; i < count; ++i) forget(*order[i]);
  counters_.evictions += count;
  return true;
}

bool HostCache::room_is_coming(const Lock&) const {
  if (slabs_.growing()) return true;
  std::uint64_t kept = 0;
  for (const Layer* layer : cached_) {
    if (layer->image.use_count() > 1) return true;
    kept += layer->image->units.blocks().size() * HostSlabs::kUnitBytes;
  }
  return kept < slabs_.state().lent_bytes;
}

void HostCache::keep(const Lock&, Layer& layer, HostImagePtr image) {
  if (!layer.model->registered) return;
  image->last_use = ++state_.clock;
  layer.image = std::move(image);
  cached_.insert(&layer);
}

void HostCache::drop(const Lock&, Model& model) {
  for (Layer& layer : model.layers) forget(layer);
}

void HostCache::clear(const Lock&) {
  for (Layer* layer : cached_) layer->image.reset();
  cached_.clear();
}

void HostCache::forget(Layer& layer) {
  layer.image.reset();
  cached_.erase(&layer);
}

void HostCache::check_invariants(const Lock&) const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw Error(ErrorKind::general, std::string("invariant broken: ") + what);
  };
  std::size_t images = 0, units = 0;
  for (const auto& [name, model] : state_.models)
    for (const Layer& layer : model->layers) {
      if (!layer.image) continue;
      ++images;
      units += layer.image->units.blocks().size();
      require(layer.image->units.blocks().size() == ceil_div(layer.bytes, HostSlabs::kUnitBytes),
              "an image does not have the size of its layer");
    }
  require(images == cached_.size(), "the host cache has an image of an unregistered model");
  require(units * HostSlabs::kUnitBytes <= slabs_.state().lent_bytes,
          "images have more units than are lent");
}

}  // namespace warmserve
