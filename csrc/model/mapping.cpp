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

void map_layers(const Arena& arena, std::span<Layer* const> layers) {
  for (auto first = layers.begin(); first != layers.end();) {
    std::vector<Layer*> run;
    std::vector<std::vector<Handle>> handles;
    std::uint64_t end = (*first)->offset;
    for (; first != layers.end() && (*first)->offset == end; ++first) {
      Layer& layer = **first;
      if (layer.granules.empty()) continue;
      if (layer.poison) {
        layer.poison->unmap();
        layer.poison.reset();
      }
      run.push_back(&layer);
      for (std::vector<Handle>& own = handles.emplace_back(); const GranuleId id : layer.granules)
        own.push_back(arena.handle(id));
      end += layer.granules.size() * arena.granule_bytes();
    }
    if (run.empty()) continue;
    const Model& model = *run.front()->model;
    std::vector<Mapping> mappings = Mapping::map_together(model.reservation, run.front()->offset,
                                                          handles, arena.granule_bytes());
    std::vector<Mapping*> mapped;
    for (std::size_t i = 0; i < run.size(); ++i)
      mapped.push_back(&run[i]->mapping.emplace(std::move(mappings[i])));
    Mapping::set_access_together(mapped, model.writable ? Access::read_write : Access::read);
  }
}

void drain_and_unmap(SharedState& state, Lock& lock, std::vector<Layer*> layers, Deadline deadline,
                     const Poll& poll, std::vector<GranuleId>& freed) {
  auto fences = fences_of(lock, layers);
  const std::shared_ptr<Clients> clients = state.clients;
  lock.unlock();
  std::exception_ptr error;
  bool reusable = !clients;  // no client can read the granules, also of layers not mapped here
  try {
    for (const auto& fence : fences) wait_unless_lost(*fence, deadline, poll);
    if (state.fence_device) synchronize_unless_lost(*state.arena.device());
    if (clients) clients->revoke(layers, poll);
    reusable = true;
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
  if (state.broker) {
    std::vector<Layer*> unmapped;
    for (Layer* layer : layers)
      if (!layer->mapping && !layer->granules.empty()) unmapped.push_back(layer);
    state.broker->unmapped(unmapped);
  }
  fences.clear();  // without the lock: dropping the last reference to a stream waits for its work
  lock.lock();
  for (Layer* layer : layers) {
    state.mark_idle(lock, *layer);
    if (!layer->mapping && (reusable || layer->granules.empty())) {
      freed.insert(freed.end(), layer->granules.begin(), layer->granules.end());
      layer->granules.clear();
      if (!layer->unmap_failed) ++state.counters.layers_evicted;
      state.transition_quietly(lock, *layer, Residency::absent);
    } else if (!layer->unmap_failed) {
      state.transition_quietly(lock, *layer, Residency::resident);
    }
  }
  state.wake();
  if (error) std::rethrow_exception(error);
}

}  // namespace warmserve
