// A client's connection to another broker, after its broker has ended.
#include <algorithm>
#include <utility>

#include "runtime/attachment.h"
#include "runtime/enrolment.h"

namespace warmserve {
namespace {

constexpr std::chrono::milliseconds kAttemptTakes{1000};

// Returns whether a thread of the application is unmapping a layer. It may have told the broker
// that has ended, so whether the layer is mapped cannot be told yet.
bool any_unmapping(const Lock&, const std::vector<ModelPtr>& models) {
  return std::ranges::any_of(models, [](const ModelPtr& model) {
    return std::ranges::any_of(model->layers, [](const Layer& layer) {
      return layer.busy && layer.residency == Residency::draining;
    });
  });
}

}  // namespace

// Tries to reach another broker at the path, and registers all models there.
void Attachment::reconnect() {
  std::vector<ModelPtr> models;
  {
    const Lock lock = state_.lock();
    for (const auto& [name, model] : state_.models) models.push_back(model);
  }
  const Deadline deadline = Clock::now() + kAttemptTakes;
  std::shared_ptr<BrokerConnection> made;
  std::map<std::uint64_t, std::weak_ptr<Model>> accepted;
  std::map<std::string, std::string> refused;
  std::vector<std::uint64_t> ids;
  try {
    made = std::make_shared<BrokerConnection>(*connection_, deadline, nullptr);
    if (made->granule_bytes != connection_->granule_bytes || made->granules > connection_->granules)
      return;  // its arena does not fit this runtime
    for (const ModelPtr& model : models) try {
        for (Message& files : files_of(*model)) made->channel.send(std::move(files));
        const Message answer = made->ask(enrolment_of(*model), deadline, nullptr);
        ids.push_back(Reader(answer.body).number());
        accepted[ids.back()] = model;
      } catch (const Error& error) {
        if (made->ended || error.kind() == ErrorKind::timeout) throw;
        ids.push_back(0);
        refused[model->name] = error.what();
      }
  } catch (const Error&) {
    return;
  }
  const Lock lock = state_.lock();
  if (any_unmapping(lock, models)) return;
  memory_.clear();
  models_ = std::move(accepted);
  refused_ = std::move(refused);
  if (made->known) made->channel.send(still_mapped(lock, models, ids));
  for (std::size_t i = 0; i < models.size(); ++i)
    if (!made->known || !ids[i]) give_up_layers_(lock, Selection(models[i]));
  {
    const std::lock_guard guard(mutex_);
    for (std::size_t i = 0; i < models.size(); ++i) models[i]->broker_id = ids[i];
    connection_ = std::move(made);
    lost_.clear();
  }
  loader_->ask_broker(lock);
}

// Returns the message that lists the layers which are still mapped. Layers of models that the
// broker has refused cannot be listed.
Message Attachment::still_mapped(const Lock&, const std::vector<ModelPtr>& models,
                                 const std::vector<std::uint64_t>& ids) {
  std::map<std::uint64_t, std::vector<std::uint32_t>> mapped;
  for (std::size_t i = 0; i < models.size(); ++i)
    for (const Layer& layer : models[i]->layers)
      if (!layer.granules.empty()) mapped[ids[i]].push_back(layer.index);
  const bool all = !mapped.contains(0);
  mapped.erase(0);
  Writer writer;
  writer.number(mapped.size());
  for (const auto& [id, layers] : mapped) writer.number(id).numbers(layers);
  return {.op = Op::still_mapped, .body = writer.number(all).take()};
}

}  // namespace warmserve
