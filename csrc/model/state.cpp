#include "model/state.h"

#include <algorithm>
#include <utility>

namespace warmserve {

const char* to_string(Residency residency) noexcept {
  switch (residency) {
    case Residency::absent: return "absent";
    case Residency::filling: return "filling";
    case Residency::resident: return "resident";
    case Residency::draining: return "draining";
  }
  return "unknown";
}

std::vector<Holder> SharedState::holders(const Lock&) const {
  std::vector<Holder> holders;
  for (const auto& [name, model] : models) {
    Holder holder{name, 0, model->leases + model->passes > 0};
    for (const Layer& layer : model->layers)
      if (layer.residency != Residency::absent || layer.held())
        holder.bytes += layer.granules_needed * arena.granule_bytes();
    if (holder.bytes) holders.push_back(holder);
  }
  return holders;
}

void SharedState::transition_quietly(const Lock&, Layer& layer, Residency to) {
  using enum Residency;
  const Residency from = layer.residency;
  const bool legal = (from == absent && to == filling) || (from == filling && to == resident) ||
                     (from == filling && to == draining) || (from == resident && to == draining) ||
                     (from == draining && to == absent) ||
                     (from == draining && to == resident && !layer.unmap_failed);
  if (!legal)
    throw Error(ErrorKind::general, std::string("layer ") + std::to_string(layer.index) + " of '" +
                                        layer.model->name + "' cannot change from " +
                                        to_string(from) + " to " + to_string(to));
  if (from == resident) ++layer.model->missing;
  if (to == resident) --layer.model->missing;
  if (to == filling || to == absent) {
    layer.model->backing_epoch.fetch_add(1, std::memory_order_release);
    epochs.signal();
  }
  if (to == absent) layer.unmap_failed = false;
  if (to == absent && std::exchange(layer.revoked, false)) --layer.model->revoked;
  layer.residency = to;
  if (from == filling) this->filling.erase(&layer);
  if (to == filling) this->filling.insert(&layer);
  EvictionOrder::update(layer);
}

void SharedState::hold(const Lock&, const Selection& selection, bool pass) {
  Model& model = *selection.model;
  if (!selection.whole) {
    selection.for_each([&](Layer& layer) {
      if (pass)
        ++layer.passes;
      else if (layer.holds == layer.passes)
        ++model.layers_leased;
      if (layer.holds++) return;
      EvictionOrder::update(layer);
      ++model.layers_held;
      model.granules_held += layer.granules_needed;
      if (!model.whole_holds) held_granules += layer.granules_needed;
    });
  } else {
    model.whole_passes += pass;
    if (model.whole_holds++ == 0) held_granules += model.granules - model.granules_held;
  }
  if (pass) return;
  ++model.leases;
  ++model.lease_epoch;
  model.last_use = ++clock;
}

void SharedState::unhold(const Lock& lock, const Selection& selection, bool pass) {
  Model& model = *selection.model;
  if (!selection.whole) {
    selection.for_each([&](Layer& layer) {
      --layer.holds;
      if (pass)
        --layer.passes;
      else if (layer.holds == layer.passes)
        --model.layers_leased;
      if (layer.holds) return;
      EvictionOrder::update(layer);
      --model.layers_held;
      model.granules_held -= layer.granules_needed;
      if (!model.whole_holds) held_granules -= layer.granules_needed;
    });
  } else {
    model.whole_passes -= pass;
    if (--model.whole_holds == 0) held_granules -= model.granules - model.granules_held;
  }
  if (!pass) {
    --model.leases;
    ++model.lease_epoch;
  }
  if (model.revoked) give_up_revoked(lock, model);
  if (room_wanted || release_wanted) wake();
}

std::uint64_t SharedState::granules_to_hold(const Lock&, const Selection& selection) const {
  const Model& model = *selection.model;
  if (model.whole_holds) return 0;
  if (selection.whole) return model.granules - model.granules_held;
  std::uint64_t granules = 0;
  selection.for_each([&](const Layer& layer) {
    if (!layer.holds) granules += layer.granules_needed;
  });
  return granules;
}

std::vector<Layer*> SharedState::choose_victims(const Lock&, std::uint64_t granules,
                                                const EvictionOrder::Spared& spared,
                                                const Model* first) {
  std::vector<Model*> all;
  all.reserve(models.size());
  for (const auto& [name, model] : models) all.push_back(model.get());
  return EvictionOrder::choose(all, granules, spared, first, &counters.layers_examined);
}

void SharedState::claim(const Lock& lock, std::span<Layer* const> layers) {
  for (Layer* layer : layers) {
    if (layer->residency == Residency::resident)
      transition_quietly(lock, *layer, Residency::draining);
    mark_busy(lock, *layer);
  }
  if (!layers.empty()) wake();
}

void SharedState::revoke(const Lock& lock, const Selection& selection, const LayerSet& yielded) {
  selection.for_each([&](Layer& layer) {
    if (layer.residency == Residency::resident)
      layer.model->revoked += !std::exchange(layer.revoked, true);
  });
  give_up_revoked(lock, *selection.model, yielded);
}

// The layers change here, before another lease can begin: leases that follow each other closely
// would otherwise keep them for ever.
void SharedState::give_up_revoked(const Lock& lock, Model& model, const LayerSet& yielded) {
  for (Layer& layer : model.layers) {
    if (layer.held() && !yielded.contains(layer.index)) continue;
    if (!layer.revoked || layer.busy || layer.residency != Residency::resident) continue;
    transition_quietly(lock, layer, Residency::draining);
    mark_busy(lock, layer);
    given_up.push_back(&layer);
  }
  if (!given_up.empty()) wake();
}

void SharedState::set_keep_value(const Lock&, Layer& layer, double keep_value) {
  layer.keep_value = keep_value;
  EvictionOrder::update(layer);
}

void SharedState::mark_busy(const Lock&, Layer& layer) {
  busy_layers += !std::exchange(layer.busy, true);
}

void SharedState::mark_idle(const Lock&, Layer& layer) {
  busy_layers -= std::exchange(layer.busy, false);
}

void SharedState::check_invariants(const Lock&) const {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw Error(ErrorKind::general, "invariant broken: " + what);
  };
  std::vector<bool> used(arena.capacity(), false);
  std::uint64_t held = 0, accounted = std::uint64_t{arena.free_count()} + arena.trimmed_count();
  accounted += arena.aside_count();
  std::uint64_t busy = 0;
  bool in_motion = granules_in_hand > 0;
  for (const auto& [name, model] : models) {
    std::uint32_t missing = 0, layers_held = 0, layers_leased = 0;
    for (const Layer& layer : model->layers) {
      const std::string where = "layer " + std::to_string(layer.index) + " of '" + name + "' (" +
                                to_string(layer.residency) + "): ";
      missing += layer.residency != Residency::resident;
      layers_held += layer.holds > 0;
      layers_leased += layer.holds > layer.passes;
      if (layer.held()) held += layer.granules_needed;
      const bool candidate = layer.granules_needed && !layer.holds &&
                             (layer.residency == Residency::resident || layer.unmap_failed);
      require(candidate == layer.candidate.has_value(),
              where + "its place among the candidates is wrong");
      busy += layer.busy;
      if (layer.busy) {  // a thread is working on it now
        in_motion = true;
        continue;
      }
      const bool backed = layer.residency != Residency::absent && layer.granules_needed;
      require(layer.granules.size() == (backed ? layer.granules_needed : 0),
              where + "holds " + std::to_string(layer.granules.size()) + " granules");
      require(layer.mapping ? backed : !backed || layer.residency != Residency::resident,
              where + "mapping does not match");
      require(layer.residency != Residency::draining || layer.unmap_failed, where + "abandoned");
      require(!(layer.mapping && layer.poison), where + "poisoned and mapped");
      require((layer.residency == Residency::filling) <= (layer.load != nullptr),
              where + "filling without a load");
      for (const GranuleId id : layer.granules) {
        require(id < arena.capacity() && !used[id] && !arena.is_free(id),
                where + "granule " + std::to_string(id) + " is used twice or free");
        used[id] = true;
        ++accounted;
      }
    }
    require(missing == model->missing, "'" + name + "' counts its missing layers wrong");
    require(layers_held == model->layers_held, "'" + name + "' counts its held layers wrong");
    require(layers_leased == model->layers_leased, "'" + name + "' counts its leased layers wrong");
  }
  require(busy == busy_layers, "busy layers are counted wrong");
  require(held == held_granules, "held granules are counted wrong");
  // A client's use is counted only once an eviction has met it.
  require(clients || held_granules <= arena.capacity(),
          "more granules are held than the arena has");
  require(in_motion ? accounted <= arena.capacity() : accounted == arena.capacity(),
          "granules are lost: " + std::to_string(accounted) + " of " +
              std::to_string(arena.capacity()));
  arena.check_invariants();
}

}  // namespace warmserve
