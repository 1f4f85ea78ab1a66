#include "runtime/attachment.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/os_failure.h"

namespace warmserve {
namespace {

// How often a client tries to reach another broker.
constexpr std::chrono::milliseconds kAttemptEvery{100};

std::exception_ptr lost_memory() {
  return std::make_exception_ptr(
      Error(ErrorKind::general,
            "the descriptor of the broker's memory was lost: this process has too many open files "
            "(see `ulimit -n`)"));
}

}  // namespace

Attachment::Attachment(SharedState& state, std::shared_ptr<BrokerConnection> connection)
    : state_(state), connection_(std::move(connection)) {
  state_.broker = this;
}

void Attachment::start(Loader& loader, bool thread, GiveUp give_up) {
  loader_ = &loader;
  give_up_layers_ = std::move(give_up);
  wake_.descriptor();
  {
    const Lock lock = state_.lock();
    state_.changes.descriptor();
  }
  if (!thread) return;
  try {
    threaded_ = true;
    thread_ = std::thread(&Attachment::run, this);
  } catch (const std::system_error& error) {
    threaded_ = false;
    throw Error(ErrorKind::general, os_failure("starting the thread that answers the broker",
                                               error.code().value(), OsLimit::threads));
  }
}

void Attachment::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    wake_.signal();
  }
  if (thread_.joinable()) thread_.join();
  threaded_ = false;
}

void Attachment::refuse_loads(const Lock& lock, std::exception_ptr why) {
  loader_->refuse_all(lock, why);
}

void Attachment::leave() {
  stop();
  try {
    send({.op = Op::bye});
  } catch (const Error&) {  // the broker has ended
    return;
  }
  const std::lock_guard lock(mutex_);
  lost_ = "the runtime has left its broker";
}

void Attachment::run() {
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
    }
    auto timeout = std::chrono::milliseconds(1000);
    {
      const Lock lock = state_.lock();
      const Deadline next = loader_->next_deadline(lock);
      if (next != kNever)
        timeout = std::clamp(std::chrono::ceil<std::chrono::milliseconds>(next - Clock::now()),
                             std::chrono::milliseconds(0), timeout);
    }
    serve(timeout);
  }
}

bool Attachment::step() {
  serve(kPollInterval);
  const std::lock_guard lock(mutex_);
  return lost_.empty() || Clock::now() < give_up_;
}

bool Attachment::ask_later(const Lock&) {
  const std::lock_guard lock(mutex_);
  return !lost_.empty() && !stopping_ && Clock::now() < give_up_;
}

// Waits for messages or changes of the runtime's state, and handles them. Returns false at the
// timeout.
bool Attachment::serve(std::chrono::milliseconds timeout) {
  bool lost = false, stopping = false;
  int changes = -1;
  {
    const Lock lock = state_.lock();
    changes = state_.changes.descriptor();
  }
  {
    const std::lock_guard lock(mutex_);
    lost = !lost_.empty();
    stopping = stopping_;
    if (!lost) connection_->channel.flush();
  }
  bool woken = false;
  if (lost) {  // its socket would always be readable
    pollfd all[] = {{changes, POLLIN, 0}, {wake_.descriptor(), POLLIN, 0}};
    woken = ::poll(all, 2, static_cast<int>(std::min(timeout, kAttemptEvery).count())) > 0;
    if (!stopping && Clock::now() >= next_attempt_) {
      next_attempt_ = Clock::now() + kAttemptEvery;
      reconnect();
    }
  } else {
    if (!connection_->earlier.empty()) timeout = std::chrono::milliseconds(0);
    woken = wait_for_socket(connection_->channel, {changes, wake_.descriptor()}, timeout);
  }
  {
    const std::lock_guard lock(mutex_);
    wake_.clear();
  }
  {
    const Lock lock = state_.lock();
    state_.changes.clear();
    loader_->ask_broker(lock);
  }
  if (!lost) try {
      for (int left = 64; left > 0; --left) {
        std::optional<Message> message = connection_->receive();
        if (!message) break;
        handle(std::move(*message));
      }
    } catch (const Channel::Ended&) {
      lose("the broker at " + connection_->path + " has ended");
    } catch (const Error& error) {
      lose("the connection to the broker at " + connection_->path + " was ended: " + error.what());
    }
  unmap_given_up();
  Lock lock = state_.lock();
  while (loader_->finish_swap(lock)) continue;
  return woken;
}

void Attachment::handle(Message message) {
  Reader body(message.body);
  switch (message.op) {
    case Op::memory: return remember(message);
    case Op::map: return map(body);
    case Op::revoke: return revoke(body);
    case Op::done: {
      const std::lock_guard lock(mutex_);
      const auto found = calls_.find(message.request);
      if (found == calls_.end()) return;
      found->second->body = std::move(message.body);
      found->second->done = true;
      calls_.erase(found);
      answered_.notify_all();
      return;
    }
    case Op::error: return fail(message);
    default: throw Error(ErrorKind::general, "a message that no broker sends");
  }
}

ModelPtr Attachment::model_of(std::uint64_t broker_id) {
  const auto found = models_.find(broker_id);
  return found == models_.end() ? nullptr : found->second.lock();
}

// Takes a descriptor of memory. If it was lost, loads fail until the broker has sent it again.
void Attachment::remember(Message& message) {
  Reader body(message.body);
  const std::uint64_t number = body.number();
  body.end();
  if (message.lost_descriptors) {
    memory_[number] = Descriptor();
    send({.op = Op::memory, .body = Writer().number(number).take()});
    return;
  }
  if (message.descriptors.size() != 1)
    throw Error(ErrorKind::general, "a message has no descriptor of memory");
  memory_[number] = std::move(message.descriptors.front());
}

// Maps layers, and gives back those that nothing waits for any more.
void Attachment::map(Reader body) {
  const std::uint64_t id = body.number();
  std::vector<Loader::Arrival> arrivals;
  std::vector<std::uint32_t> unwanted, lost;
  for (std::size_t left = body.count(2 * sizeof(std::uint64_t)); left > 0; --left) {
    Loader::Arrival arrival{body.small_number(), {}};
    bool has_memory = true;
    for (std::size_t runs = body.count(3 * sizeof(std::uint64_t)); runs > 0; --runs) {
      const auto memory = memory_.find(body.number());
      const std::uint64_t offset = body.number(), count = body.number();
      if (memory == memory_.end() || count > connection_->granules)
        throw Error(ErrorKind::general, "a message names memory that was not sent");
      has_memory &= static_cast<bool>(memory->second);
      for (std::uint64_t i = 0; i < count; ++i)
        arrival.granules.push_back({memory->second.get(), offset + i * connection_->granule_bytes});
    }
    if (has_memory)
      arrivals.push_back(std::move(arrival));
    else
      lost.push_back(arrival.layer);
  }
  body.end();
  {
    Lock lock = state_.lock();
    if (const ModelPtr model = model_of(id)) {
      for (const std::uint32_t index : lost) {
        if (index >= model->layers.size()) continue;
        Layer& layer = model->layers[index];
        loader_->refuse(lock, layer, layer.load ? layer.load->request : 0, lost_memory());
      }
      unwanted = loader_->arrive(lock, *model, arrivals);
    } else {
      for (const Loader::Arrival& arrival : arrivals) unwanted.push_back(arrival.layer);
    }
  }
  unwanted.insert(unwanted.end(), lost.begin(), lost.end());
  if (!unwanted.empty())
    send({.op = Op::unmapped, .body = Writer().number(id).numbers(unwanted).take()});
}

void Attachment::revoke(Reader body) {
  const std::uint64_t id = body.number();
  const std::vector<std::uint32_t> wanted = body.numbers();
  body.end();
  std::vector<std::uint32_t> held;
  {
    const Lock lock = state_.lock();
    const ModelPtr model = model_of(id);
    if (!model) return;
    LayerSet layers;
    for (const std::uint32_t index : wanted)
      if (index < model->layers.size()) layers.insert(index);
    const Selection selection(model, std::move(layers));
    give_up_layers_(lock, selection).for_each([&](std::uint32_t index) { held.push_back(index); });
  }
  if (!held.empty()) send({.op = Op::held, .body = Writer().number(id).numbers(held).take()});
}

// Handles an error that answers a call, or a request for layers.
void Attachment::fail(const Message& message) {
  Reader body(message.body);
  const std::exception_ptr error = error_in(body);
  if (message.request == 0) std::rethrow_exception(error);  // why the broker ends the connection
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = calls_.find(message.request); found != calls_.end()) {
      found->second->error = error;
      found->second->done = true;
      calls_.erase(found);
      answered_.notify_all();
      return;
    }
  }
  const std::uint64_t id = body.number();
  const std::vector<std::uint32_t> layers = body.numbers();
  const Lock lock = state_.lock();
  const ModelPtr model = model_of(id);
  for (const std::uint32_t index : layers)
    if (model && index < model->layers.size())
      loader_->refuse(lock, model->layers[index], message.request, error);
}

void Attachment::unmap_given_up() {
  Lock lock = state_.lock();
  const std::vector<Layer*> layers = std::exchange(state_.given_up, {});
  if (layers.empty()) return;
  std::vector<GranuleId> freed;
  try {
    drain_and_unmap(state_, lock, layers, kNever, nullptr, freed);
  } catch (const Error&) {  // the layers stay mapped; the broker keeps them for this client
  }
  state_.arena.give(freed);
}

void Attachment::lose(const std::string& why) {
  {
    const std::lock_guard lock(mutex_);
    lost_ = why;
    give_up_ = Clock::now() + connection_->patience;
    const auto error = std::make_exception_ptr(Error(ErrorKind::general, why));
    for (const auto& [request, call] : std::exchange(calls_, {})) {
      call->error = error;
      call->done = true;
    }
    answered_.notify_all();
  }
  const Lock lock = state_.lock();
  loader_->ask_again(lock);
}

}  // namespace warmserve
