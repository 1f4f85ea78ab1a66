#include "model/mapping.h"

#include <algorithm>
#include <exception>
#include <map>
#include <set>

namespace warmserve {
namespace {

void cover_with_poison(const Arena& arena, Layer& layer) {
  if (arena.poison() == Handle::none) return;
  const std::vector<Handle> handles(layer.granules_needed, arena.poison());
  try {
    Mapping poison(layer.model->reservation, layer.offset, handles, arena.granule_bytes());
    layer.poison.emplace(std::move(poison));
    layer.poison->set_access(Access::read);
  } catch (const Error&) {  // a debugging aid: without it, accesses fault, as they do by default
  }
}

// Returns runs of mapped layers that are adjacent in one reservation. One call unmaps a run.
std::vector<std::vector<Layer*>> adjacent_runs(std::vector<Layer*> layers) {
  std::sort(layers.begin(), layers.end(), [](const Layer* a, const Layer* b) {
    return std::pair(a->model->id, a->offset) < std::pair(b->model->id, b->offset);
  });
  std::vector<std::vector<Layer*>> runs;
  for (Layer* layer : layers) {
    if (!layer->mapping) continue;
    const bool adjacent =
        !runs.empty() && runs.back().back()->model == layer->model &&
        runs.back().back()->offset + runs.back().back()->mapping->bytes() == layer->offset;
    if (!adjacent) runs.emplace_back();
    runs.back().push_back(layer);
  }
  return runs;
}

void unmap_layers(const Arena& arena, const std::vector<Layer*>& run) {
  std::vector<Mapping*> mappings;
  for (Layer* layer : run) mappings.push_back(&*layer->mapping);
  Mapping::unmap_together(mappings);
  for (Layer* layer : run) {
    layer->mapping.reset();
    cover_with_poison(arena, *layer);
  }
}

// Returns the fences that draining the layers must wait for.
std::vector<FencePtr> fences_of(const Lock&, const std::vector<Layer*>& layers) {
  std::map<const Model*, LayerSet> drained;
  for (const Layer* layer : layers) drained[layer->model].insert(layer->index);
  std::vector<FencePtr> fences;
  for (const auto& [model, set] : drained)
    for (const Use& use : model->uses)
      if (use.layers.intersects(set)) fences.push_back(use.fence);
  return fences;
}

// Does not wait on a lost device, because it no longer uses memory.
void wait_unless_lost(const Fence& fence, Deadline deadline, const Poll& poll) {
  try {
    fence.wait(deadline, poll);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::device_lost) throw;
  }
}

void synchronize_unless_lost(Device& device) {
  try {
    device.synchronize();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::device_lost) throw;
  }
}

}  // namespace

void map_layer(const Arena& arena, Layer& layer) {
  if (layer.granules.empty()) return;
  if (layer.poison) {
    layer.poison->unmap();
    layer.poison.reset();
  }
  std::vector<Handle> handles;
  for (const GranuleId id : layer.granules) handles.push_back(arena.handle(id));
  Mapping mapping(layer.model->reservation, layer.offset, handles, arena.granule_bytes());
  layer.mapping.emplace(std::move(mapping));
  layer.mapping->set_access(layer.model->writable ? Access::read_write : Access::read);
}

void drain_and_unmap(SharedState& state, Lock& lock, std::vector<Layer*> layers, Deadline deadline,
                     const Poll& poll, std::vector<GranuleId>& freed) {
  auto fences = fences_of(lock, layers);
  lock.unlock();
  std::exception_ptr error;
  try {
    for (const auto& fence : fences) wait_unless_lost(*fence, deadline, poll);
    if (state.fence_device) synchronize_unless_lost(*state.arena.device());
    for (const auto& run : adjacent_runs(layers)) unmap_layers(state.arena, run);
    lock.lock();
    std::set<Model*> models;
    for (const Layer* layer : layers) models.insert(layer->model);
    for (Model* model : models)
      std::erase_if(model->uses, [&](const Use& use) {
        return std::find(fences.begin(), fences.end(), use.fence) != fences.end();
      });
    lock.unlock();
  } catch (...) {
    error = std::current_exception();
  }
  fences.clear();  // without the lock: dropping the last reference to a stream waits for its work
  lock.lock();
  for (Layer* layer : layers) {
    state.mark_idle(lock, *layer);
    if (!layer->mapping) {
      freed.insert(freed.end(), layer->granules.begin(), layer->granules.end());
      layer->granules.clear();
      if (!layer->unmap_failed) ++state.counters.layers_evicted;
      state.transition(lock, *layer, Residency::absent);
    } else if (!layer->unmap_failed) {
      state.transition(lock, *layer, Residency::resident);
    }
  }
  state.wake();
  if (error) std::rethrow_exception(error);
}

}  // namespace warmserve
