// The runtime's operations for a broker, which serves its arena to other processes; and those of a
// client, whose broker wants layers back.
#include <limits>

#include "runtime/runtime.h"

namespace warmserve {

void Runtime::refuse_client(const char* operation) const {
  if (attachment_)
    throw Error(
        ErrorKind::invalid_argument,
        std::string(operation) + " is not available in a runtime that uses a broker's arena");
}

int Runtime::serve(std::shared_ptr<Clients> clients) {
  refuse_client("a broker");
  std::shared_ptr<Clients> earlier;
  {
    const Lock lock = lock_alive();
    earlier = state_.clients;
  }
  if (earlier && earlier->any_mapped())
    throw Error(ErrorKind::busy, "a process still maps layers of an earlier broker of this arena");
  const Lock lock = lock_alive();
  state_.clients = std::move(clients);
  return state_.changes.descriptor();
}

void Runtime::clear_changes() {
  const Lock lock = state_.lock();
  state_.changes.clear();
}

ModelPtr Runtime::find(const std::string& name) {
  const Lock lock = lock_alive();
  const auto found = state_.models.find(name);
  return found == state_.models.end() ? nullptr : found->second;
}

std::vector<Runtime::Granted> Runtime::granted(const Selection& selection) {
  std::vector<Granted> found;
  const Lock lock = state_.lock();
  selection.for_each([&](const Layer& layer) {
    if (layer.residency == Residency::resident && !layer.busy)
      found.push_back({layer.index, layer.granules});
  });
  return found;
}

std::vector<Runtime::Granted> Runtime::recorded(const Selection& selection) {
  std::vector<Granted> found;
  const Lock lock = state_.lock();
  selection.for_each([&](const Layer& layer) {
    if (const auto* granules = arena_.recorded(layer.key))
      found.push_back({layer.index, *granules});
  });
  return found;
}

std::uint64_t Runtime::arena_id() {
  const Lock lock = state_.lock();
  return arena_.id();
}

// Each layer has a ticket of its own, so that none fails with another. They are the most urgent
// ones, because a load that waits for room may wait for the eviction of these layers.
void Runtime::adopt(const Selection& selection) {
  reservation(selection.model);
  const Lock lock = lock_alive();
  selection.for_each([&](const Layer& layer) {
    LayerSet one;
    one.insert(layer.index);
    loader_.request(
        lock, std::make_shared<Ticket>("taking over '" + selection.model->name + "'",
                                       std::numeric_limits<int>::max(),
                                       std::vector{Selection(selection.model, std::move(one))}));
  });
}

void Runtime::set_aside(const std::vector<GranuleId>& ids) {
  const Lock lock = state_.lock();
  arena_.set_aside(ids);
}

void Runtime::end_set_aside(const std::vector<GranuleId>& ids) {
  const Lock lock = state_.lock();
  arena_.end_set_aside(ids);
  state_.wake();
}

std::exception_ptr Runtime::failure(const LeasePtr& lease) {
  const Lock lock = state_.lock();
  if (lease->entry && lease->entry->error) return lease->entry->error;
  return lease->ticket ? lease->ticket->error : nullptr;
}

std::exception_ptr Runtime::failure(const TicketPtr& ticket) {
  const Lock lock = state_.lock();
  return ticket->error;
}

LeasePtr Runtime::hold_for_client(const Selection& selection, std::uint64_t client) {
  auto lease = std::make_shared<Lease>();
  lease->wants.push_back(selection);
  lease->owner = client;
  const Lock lock = state_.lock();
  lease_queue_.admit(lock, lease);
  ++state_.held_by_clients;
  state_.wake();
  return lease;
}

bool Runtime::overcommitted() {
  const Lock lock = state_.lock();
  return state_.held_granules > arena_.capacity();
}

void Runtime::end_hold(const LeasePtr& lease) {
  {
    const Lock lock = state_.lock();
    --state_.held_by_clients;
  }
  end_lease(lease);
}

// A lease that waits for some layers gives the others up and wants them again. It would otherwise
// keep a lease of another client waiting, which was admitted before it and for which it waits.
LayerSet Runtime::give_up(const Lock& lock, const Selection& selection) {
  recall_guards(lock, &selection);
  const ModelPtr& model = selection.model;
  LayerSet yielded, used;
  selection.for_each([&](Layer& layer) {
    if (layer.residency != Residency::resident || layer.busy || !layer.held()) return;
    const std::vector<TicketPtr> waiting = lease_queue_.waiting_for(lock, layer);
    LayerSet one;
    one.insert(layer.index);
    (waiting.empty() ? used : yielded).insert(one);
  });
  state_.revoke(lock, selection, yielded);
  yielded.for_each([&](std::uint32_t index) {
    Layer& layer = model->layers[index];
    for (const TicketPtr& ticket : lease_queue_.waiting_for(lock, layer))
      loader_.want_again(lock, ticket, layer, model);
  });
  return used;
}

}  // namespace warmserve
