// Taking layers back from clients, so that their granules can be reused.
#include <algorithm>
#include <utility>

#include "broker/server.h"

namespace warmserve {

void BrokerServer::revoke(std::span<Layer* const> layers, const Poll& poll) {
  std::map<std::uint64_t, LayerSet> wanted;
  for (const Layer* layer : layers) wanted[layer->model->id].insert(layer->index);
  std::unique_lock lock(mutex_);
  for (const ClientPtr& client : clients_)
    if (!client->settled) recognize(*client, layers);
  // Returns the wanted layers of a model that the client may still map.
  const auto still = [](const Client& client, std::uint64_t id, const LayerSet& set) {
    const auto mapped = client.mapped.find(id);
    return mapped == client.mapped.end() ? LayerSet() : mapped->second.common(set);
  };
  for (const ClientPtr& client : clients_)
    for (const auto& [id, set] : wanted) {
      LayerSet ask = still(*client, id, set);
      LayerSet& asked = client->revoked[id];
      ask.remove(asked);
      if (ask.empty()) continue;
      asked.insert(ask);
      send_revoke(*client, id, ask);
    }
  if (stopping_) forget_ended();  // the thread that would notice has ended
  const Deadline deadline = Clock::now() + patience_;
  for (;;) {
    bool waiting = false;
    for (const ClientPtr& client : clients_)
      for (const auto& [id, set] : wanted) {
        const LayerSet left = still(*client, id, set);
        if (left.empty()) continue;
        const bool late = Clock::now() >= deadline || stopping_;
        const bool held = std::any_of(
            client->holds.begin(), client->holds.end(), [&, number = id](const Hold& hold) {
              return hold.model->id == number && hold.layers.intersects(left);
            });
        if (late && !held) {  // what it may still read must not be reused
          client->stuck = true;
          hold(*client, model_of(id), left);
        }
        if (late || held)
          throw HeldByClient("layers of '" + model_of(id)->name + "' are used by process " +
                             std::to_string(client->pid) + " (" + client->name + ")" +
                             (client->stuck ? ", which does not answer" : ""));
        waiting = true;
      }
    if (!waiting) return;
    answered_.wait_until(lock, std::min(deadline, Clock::now() + kPollInterval));
    if (!poll) continue;
    lock.unlock();
    poll();
    lock.lock();
  }
}

void BrokerServer::send_revoke(Client& client, std::uint64_t model, const LayerSet& layers) {
  std::vector<std::uint32_t> indices;
  layers.for_each([&](std::uint32_t index) { indices.push_back(index); });
  if (!indices.empty())
    send(client, {.op = Op::revoke, .body = Writer().number(model).numbers(indices).take()});
}

// Counts layers as leased by the client, unless they are already.
void BrokerServer::hold(Client& client, const ModelPtr& model, const LayerSet& layers) {
  LayerSet more = layers;
  for (const Hold& hold : client.holds)
    if (hold.model == model) more.remove(hold.layers);
  if (more.empty()) return;
  client.holds.push_back(
      {model, more, runtime_.hold_for_client(Selection(model, more), client.id)});
  if (runtime_.overcommitted()) queue_again();
}

// Queues all incomplete leases again, because some were admitted before a use was known that leaves
// too little room for them. Leases of clients that use layers are queued first: others may wait for
// these layers, and they do not wait for others. The queue finds out which could wait for ever.
void BrokerServer::queue_again() {
  for (const ClientPtr& client : clients_)
    for (Pending& pending : client->pending)
      if (pending.lease) runtime_.end_lease(std::exchange(pending.lease, nullptr));
  for (const bool uses : {true, false})
    for (const ClientPtr& client : clients_) {
      if (client->holds.empty() == uses) continue;
      for (Pending& pending : client->pending)
        if (!pending.lease && !pending.ticket && !pending.left.empty())
          begin_lease(*client, pending);
    }
  // Requests that failed have no layers left: advance() removes them.
}

// Answers a request with an error for the layers that are left of it.
void BrokerServer::fail(Client& client, Pending& pending, std::exception_ptr error) {
  std::vector<std::uint32_t> indices;
  pending.left.for_each([&](std::uint32_t index) { indices.push_back(index); });
  pending.left = {};
  send_error(client, pending.request, error,
             Writer().number(pending.wanted.model->id).numbers(indices).take());
}

void BrokerServer::held(Client& client, Reader body) {
  const Selection selection = selection_of(body);
  body.end();
  const auto mapped = client.mapped.find(selection.model->id);
  if (mapped == client.mapped.end()) return;
  hold(client, selection.model, mapped->second.common(selection.layers));
  answered_.notify_all();
}

void BrokerServer::unmapped(Client& client, Reader body) {
  const Selection selection = selection_of(body);
  body.end();
  drop_mapped(client, selection.model, selection.layers);
}

void BrokerServer::drop_mapped(Client& client, const ModelPtr& model, const LayerSet& layers) {
  std::vector<GranuleId> unmarked;
  layers.for_each([&](std::uint32_t index) {
    const auto found = client.granules.find({model->id, index});
    if (found == client.granules.end()) return;
    client.record->clear(found->second);
    unmarked.insert(unmarked.end(), found->second.begin(), found->second.end());
    client.granules.erase(found);
  });
  free_unless_marked(unmarked);
  for (auto* sets : {&client.mapped, &client.revoked}) {
    const auto found = sets->find(model->id);
    if (found == sets->end()) continue;
    found->second.remove(layers);
    if (found->second.empty()) sets->erase(found);
  }
  for (auto each = client.holds.begin(); each != client.holds.end();) {
    if (each->model == model) each->layers.remove(layers);
    if (!each->layers.empty()) {
      ++each;
      continue;
    }
    const LeasePtr lease = each->lease;
    each = client.holds.erase(each);
    runtime_.end_hold(lease);
  }
  answered_.notify_all();
}

}  // namespace warmserve
