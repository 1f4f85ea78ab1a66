// A client's end of the connection to its broker.
//
// One native thread reads the broker's messages, whatever the threads of Python do: it maps the
// layers that the broker has filled, and unmaps those that the broker wants back. Without threads,
// step() does its work.
//
// After the broker has ended, layers that are mapped stay usable. Loads wait for another broker at
// the path, for BrokerConnection::patience; then they fail, and so do other requests at once.
// If it has the same arena, layers stay mapped. Else they are given up when nothing holds them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "load/loader.h"
#include "runtime/broker_connection.h"

namespace warmserve {

class Attachment final : public Broker {
 public:
  Attachment(SharedState& state, std::shared_ptr<BrokerConnection> connection);
  ~Attachment() override { stop(); }

  // Gives up layers that the broker wants back, as soon as nothing uses them. Returns those that
  // are still used. Called under the runtime's lock.
  using GiveUp = std::function<LayerSet(const Lock&, const Selection&)>;
  // Called once, before any other function. With `thread`, starts the thread.
  void start(Loader& loader, bool thread, GiveUp give_up);
  // Ends the thread. Idempotent. Blocks until the thread has handled its message.
  void stop();
  // Ends the loads that wait for the broker. For the end of the runtime.
  void refuse_loads(const Lock& lock, std::exception_ptr why);
  // Stops, and tells the broker that nothing is mapped here any more.
  void leave();

  // Registers the model at the broker, which reads its files. Throws what the broker throws:
  // invalid_argument if the broker has a model of this name with other files or layers. Blocks.
  void enroll(const ModelPtr& model, const Poll& poll);
  // Evicts the layers from the arena, and so from all clients. Blocks. `wait_for` is WaitFor.
  void evict(const Model& model, const LayerSet& layers, std::uint32_t wait_for, Deadline deadline,
             const Poll& poll);
  // Sends the keep values of all layers of the model. Wait-free.
  void keep(const Lock&, const Model& model);

  std::uint64_t want(const Lock&, const Model& model, const LayerSet& layers,
                     const WantOptions& options) override;
  void cancel(const Lock&, std::uint64_t request, const Layer& layer) override;
  void unmapped(std::span<Layer* const> layers) noexcept override;
  bool ask_later(const Lock&) override;
  bool step() override;
  bool has_thread() const noexcept override { return threaded_.load(); }

 private:
  struct Call {
    bool done = false;
    std::exception_ptr error;
    std::vector<std::byte> body;
  };

  void run();
  bool serve(std::chrono::milliseconds timeout);
  void handle(Message message);
  void remember(Message& message);
  void map(Reader body);
  void revoke(Reader body);
  void fail(const Message& message);
  void unmap_given_up();
  void lose(const std::string& why);
  void reconnect();
  Message still_mapped(const Lock&, const std::vector<ModelPtr>& models,
                       const std::vector<std::uint64_t>& ids);
  std::uint64_t send(Message message);
  std::uint64_t send_locked(Message message);
  // Made under `mutex_`, because a model's number at the broker changes with the broker.
  using MakeMessage = std::function<Message()>;
  std::vector<std::byte> call(const MakeMessage& make, Deadline deadline, const Poll& poll);
  ModelPtr model_of(std::uint64_t broker_id);

  SharedState& state_;

  Loader* loader_ = nullptr;
  GiveUp give_up_layers_;

  // Only the thread that handles messages uses it.
  std::map<std::uint64_t, Descriptor> memory_;  // files of granules, by the broker's numbers
  Deadline next_attempt_{};                     // to reach another broker

  // Under the runtime's lock.
  std::map<std::uint64_t, std::weak_ptr<Model>> models_;
  std::map<std::string, std::string> refused_;  // models that another broker has refused: why

  std::mutex mutex_;  // a leaf: guards all below, and sending
  std::condition_variable answered_;
  std::map<std::uint64_t, std::shared_ptr<Call>> calls_;
  std::uint64_t next_request_ = 1;
  // Replaced only by the thread that handles messages, which reads it without the mutex.
  std::shared_ptr<BrokerConnection> connection_;
  std::string lost_;    // why there is no broker; empty while there is one
  Deadline give_up_{};  // end of the loads' wait for another broker
  bool stopping_ = false;
  EventFd wake_;  // signalled to end a wait for messages

  std::atomic<bool> threaded_{false};
  std::thread thread_;  // last: it uses all members above
};

}  // namespace warmserve
