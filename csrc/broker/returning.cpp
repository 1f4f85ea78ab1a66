// Clients that connect again, to this broker or after it has taken over from an earlier one that
// died.
//
// A new broker knows the granules that such a client may map, but not of which models: these are
// registered again when clients connect. Until the client says which layers it maps, or its process
// ends, its granules are set aside, except for loads of the layers that they contain.
#include <algorithm>
#include <utility>

#include "base/os_failure.h"
#include "broker/server.h"

namespace warmserve {

void BrokerServer::take_over(const Options& options) {
  keeper_.emplace(duplicated(options.keeper, "the keeper's socket"));
  const auto granules = static_cast<std::uint32_t>(granules_);
  for (const auto& [process, record] : options.former_clients) {
    const auto client = std::make_shared<Client>(++next_client_, Descriptor());
    client->process = duplicated(process, "a client's process");
    client->record =
        std::make_unique<ClientRecord>(duplicated(record, "a client's record"), granules);
    client->token = client->record->token();
    client->pid = client->record->process();
    client->name = client->record->name();
    client->welcome = client->ended = true;
    client->settled = false;
    runtime_.set_aside(client->record->all_marked());
    clients_.push_back(client);
  }
}

// Returns the client that had this token, if it is of the same process; it continues with the new
// connection. Else returns the new client.
BrokerServer::Client& BrokerServer::resumed(Client& client, std::uint64_t token) {
  const auto former = std::ranges::find_if(clients_, [&](const ClientPtr& each) {
    return each.get() != &client && each->token == token && each->pid == client.pid;
  });
  if (!token || former == clients_.end()) return client;
  Client& back = **former;
  if (!back.ended) end_connection(back);
  std::swap(back.channel, client.channel);
  std::swap(back.process, client.process);
  back.name = client.name;
  back.files.clear();
  back.memory.clear();  // it asks for its descriptors anew
  back.ended = back.closing = back.stuck = false;
  client.ended = true;
  client.welcome = false;
  return back;
}

// Handles the list of layers that a client still maps after it has connected again.
void BrokerServer::still_mapped(Client& client, Reader body) {
  std::map<std::uint64_t, LayerSet> listed;
  for (std::size_t left = body.count(2 * sizeof(std::uint64_t)); left > 0; --left) {
    const Selection selection = selection_of(body);
    listed[selection.model->id].insert(selection.layers);
  }
  bool all = body.number();  // it maps nothing else
  body.end();
  for (const auto& [id, layers] : listed) {
    const ModelPtr model = model_of(id);
    LayerSet unknown = layers;
    unknown.remove(client.mapped[id]);
    if (!client.settled)
      for (const Runtime::Granted& layer : runtime_.recorded(Selection(model, unknown)))
        if (std::ranges::all_of(layer.granules,
                                [&](GranuleId each) { return client.record->marked(each); }))
          add_mapped(client, *model, layer.layer, layer.granules);
    unknown.remove(client.mapped[id]);
    all &= unknown.empty();
    send_revoke(client, id, unknown);
  }
  std::erase_if(client.mapped, [](const auto& each) { return each.second.empty(); });
  for (const auto& [id, layers] : std::map(client.mapped)) {
    LayerSet gone = layers;
    gone.remove(listed[id]);
    drop_mapped(client, model_of(id), gone);
  }
  if (all && !client.settled) settle(client);
  for (const auto& [id, layers] : client.revoked) send_revoke(client, id, layers);
  for (const auto& [id, layers] : client.mapped) runtime_.adopt({model_of(id), layers});
}

// Frees the granules that the client does not map any more.
void BrokerServer::settle(Client& client) {
  std::vector<GranuleId> rest = client.record->all_marked();
  std::set<GranuleId> mapped;
  for (const auto& [layer, ids] : client.granules) mapped.insert(ids.begin(), ids.end());
  std::erase_if(rest, [&](GranuleId id) { return mapped.contains(id); });
  client.record->clear(rest);
  client.settled = true;
  free_unless_marked(rest);
}

// Forgets what the client may map according to its record, when it maps nothing any more.
void BrokerServer::end_record(Client& client) {
  client.granules.clear();
  client.settled = true;
  if (!client.record) return;
  const std::vector<GranuleId> ids = client.record->all_marked();
  keeper_->drop(std::to_string(client.token));
  client.record.reset();
  free_unless_marked(ids);
}

// Frees those of the granules that are set aside and that no client may map.
void BrokerServer::free_unless_marked(const std::vector<GranuleId>& ids) {
  if (ids.empty()) return;
  std::vector<GranuleId> free = ids;
  for (const ClientPtr& client : clients_)
    if (client->record)  // a settled client's layer may still wait to be made resident
      std::erase_if(free, [&](GranuleId id) { return client->record->marked(id); });
  runtime_.end_set_aside(free);
}

// Records that the client maps those of the layers whose granules it may map according to its
// record. The calling thread owns the layers.
void BrokerServer::recognize(Client& client, std::span<Layer* const> layers) {
  for (const Layer* layer : layers) {
    if (layer->granules.empty() || !client.record->marked(layer->granules.front())) continue;
    const Model& model = *layer->model;
    if (!models_.contains(model.id)) models_[model.id] = runtime_.find(model.name);
    add_mapped(client, model, layer->index, layer->granules);
  }
}

void BrokerServer::add_mapped(Client& client, const Model& model, std::uint32_t layer,
                              const std::vector<GranuleId>& granules) {
  if (client.record) {
    client.record->mark(granules);
    client.granules[{model.id, layer}] = granules;
  }
  client.mapped[model.id].insert(layer);
}

}  // namespace warmserve
