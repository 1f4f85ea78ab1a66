// The requests of clients.
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <system_error>
#include <utility>

#include "base/os_failure.h"
#include "base/random_number.h"
#include "broker/server.h"

namespace warmserve {
namespace {

constexpr std::size_t kMostFiles = 4096;       // of one model
constexpr std::ptrdiff_t kMostEvictions = 64;  // of one client, each with a thread

// Converts the nanoseconds that a deadline has left.
Deadline deadline_in(std::uint64_t nanoseconds) {
  constexpr std::uint64_t kMost = 1'000'000'000ull * 86'400 * 365;
  return nanoseconds > kMost ? kNever : Clock::now() + std::chrono::nanoseconds(nanoseconds);
}

// Returns how the files or layers of two models differ; "" if they do not.
std::string difference(const std::vector<File>& files, const std::vector<LayerShape>& layers,
                       const Model& model) {
  const auto same_file = [](const File& a, const File& b) {
    const FileIdentity &x = a.identity(), &y = b.identity();
    return x.device == y.device && x.inode == y.inode && x.size == y.size &&
           x.mtime_ns == y.mtime_ns;
  };
  if (!std::ranges::equal(files, model.files, same_file)) return "other files";
  if (layers.size() != model.layers.size()) return "another number of layers";
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const auto same = [](const Segment& a, const Segment& b) {
      return a.file == b.file && a.file_offset == b.file_offset &&
             a.layer_offset == b.layer_offset && a.bytes == b.bytes && a.cast == b.cast;
    };
    if (layers[i].bytes != model.layers[i].bytes ||
        !std::ranges::equal(layers[i].segments, model.layers[i].source.segments, same))
      return "other tensors in layer " + std::to_string(i);
  }
  return "";
}

}  // namespace

void BrokerServer::handle(Client& client, Message message) {
  if (!client.welcome && message.op != Op::hello)
    throw Error(ErrorKind::general, "the first message must be hello");
  Reader body(message.body);
  if (message.lost_descriptors)
    throw Error(ErrorKind::general,
                "the broker lost descriptors of a message: it has too many open files "
                "(see `ulimit -n`)");
  switch (message.op) {
    case Op::hello: return hello(client, message);
    case Op::files:
      if (client.files.size() + message.descriptors.size() > kMostFiles)
        throw Error(ErrorKind::general,
                    "a model has at most " + std::to_string(kMostFiles) + " files");
      for (Descriptor& file : message.descriptors) client.files.push_back(std::move(file));
      return;
    case Op::enroll: return enroll(client, message);
    case Op::want: return want(client, message);
    case Op::cancel: return cancel(client, body);
    case Op::unmapped: return unmapped(client, body);
    case Op::held: return held(client, body);
    case Op::evict: return evict(client, message);
    case Op::keep: return keep(client, body);
    case Op::status: return status(client, message.request);
    case Op::still_mapped: return still_mapped(client, body);
    case Op::memory: client.memory.erase(body.number()); return;
    case Op::bye: forget(client); return end_connection(client);
    default: throw Error(ErrorKind::general, "a message that no client sends");
  }
}

ModelPtr BrokerServer::model_of(std::uint64_t id) const {
  const auto found = models_.find(id);
  if (found == models_.end())
    throw Error(ErrorKind::general, "the broker has no model " + std::to_string(id));
  return found->second;
}

Selection BrokerServer::selection_of(Reader& body) const {
  const ModelPtr model = model_of(body.number());
  LayerSet layers;
  for (const std::uint32_t index : body.numbers()) {
    if (index >= model->layers.size())
      throw Error(ErrorKind::general,
                  "'" + model->name + "' has no layer " + std::to_string(index));
    layers.insert(index);
  }
  return {model, std::move(layers)};
}

void BrokerServer::hello(Client& client, const Message& message) {
  Reader body(message.body);
  const std::uint64_t protocol = body.number();
  const std::string version = body.text();
  if (protocol != kProtocol) {
    send_error(client, message.request,
               std::make_exception_ptr(Error(
                   ErrorKind::general,
                   "warmserve-rt " + version + " speaks protocol " + std::to_string(protocol) +
                       ", but the broker is warmserve-rt " + version_ + " and speaks protocol " +
                       std::to_string(kProtocol) + ": install the same version for both")));
    client.closing = true;
    return;
  }
  client.name = body.text();
  const std::uint64_t arena = body.number(), token = body.number();
  body.end();
  client.welcome = true;
  Client& welcome = arena == arena_id_ ? resumed(client, token) : client;
  if (!welcome.token) welcome.token = random_number();
  const bool known = &welcome != &client;
  send(welcome, {.op = Op::welcome,
                 .request = message.request,
                 .body = Writer()
                             .number(granule_bytes_)
                             .number(granules_)
                             .number(arena_id_)
                             .number(welcome.token)
                             .number(known)
                             .take()});
}

// Registers a model, or finds it if another client has registered the same one.
void BrokerServer::enroll(Client& client, const Message& message) try {
  std::vector<Descriptor> descriptors = std::exchange(client.files, {});
  Reader body(message.body);
  const std::string name = body.text();
  std::vector<File> files;
  const std::size_t count = body.count(6 * sizeof(std::uint64_t));
  if (count != descriptors.size())
    throw Error(ErrorKind::general, "a model of " + std::to_string(count) + " files came with " +
                                        std::to_string(descriptors.size()) + " descriptors");
  for (Descriptor& descriptor : descriptors) {
    const std::string path = body.text();
    FileIdentity identity;
    identity.device = body.number();
    identity.inode = body.number();
    identity.size = body.number();
    identity.mtime_ns = body.number();
    identity.ctime_ns = body.number();
    struct stat status{};
    if (::fstat(descriptor.get(), &status) != 0 || !S_ISREG(status.st_mode))
      throw Error(ErrorKind::invalid_argument, path + " is not a regular file");
    files.emplace_back(descriptor.release(), path, identity);
  }
  std::vector<LayerShape> layers(body.count(3 * sizeof(std::uint64_t)));
  for (LayerShape& layer : layers) {
    layer.bytes = body.number();
    layer.segments.resize(body.count(5 * sizeof(std::uint64_t)));
    for (Segment& segment : layer.segments) {
      segment.file = body.small_number();
      segment.file_offset = body.number();
      segment.layer_offset = body.number();
      segment.bytes = body.number();
      const std::uint64_t cast = body.number();
      if (cast) segment.cast = static_cast<CastKind>(cast - 1);
      if (cast > UINT32_MAX || (cast && widths(*segment.cast).from == 0))
        throw Error(ErrorKind::general, "a message names an unknown cast");
    }
    for (std::size_t checks = body.count(2 * sizeof(std::uint64_t)); checks > 0; --checks) {
      const std::uint32_t granule = body.small_number();
      layer.checks.push_back({granule, body.number()});
    }
  }
  body.end();
  // The broker's own process may have registered it too.
  ModelPtr model = runtime_.find(name);
  if (!model) {
    model = runtime_.register_model(name, std::move(files), layers, false);
  } else if (model->writable) {
    throw Error(ErrorKind::invalid_argument,
                "the broker's model '" + name + "' is writable, and clients can only read");
  } else if (const std::string other = difference(files, layers, *model); !other.empty()) {
    throw Error(ErrorKind::invalid_argument, "the broker has a model '" + name + "' with " + other +
                                                 ": register it by another name");
  }
  runtime_.reservation(model);
  models_[model->id] = model;
  if (keeper_ && !client.record) {  // before anything is mapped
    auto record = std::make_unique<ClientRecord>(static_cast<std::uint32_t>(granules_),
                                                 client.token, client.pid, client.name);
    keeper_->keep(std::to_string(client.token), {client.process.get(), record->descriptor()});
    client.record = std::move(record);
  }
  send(client,
       {.op = Op::done, .request = message.request, .body = Writer().number(model->id).take()});
} catch (const Error&) {
  send_error(client, message.request, std::current_exception());
}

void BrokerServer::want(Client& client, const Message& message) {
  Reader body(message.body);
  const Selection selection = selection_of(body);
  const bool lease = body.number();
  const auto priority = static_cast<std::int64_t>(body.number());
  const Deadline deadline = deadline_in(body.number());
  const double evict_below = body.real();
  const std::uint64_t swapped_out = body.number();
  body.end();
  Pending pending{message.request, selection, selection.layers, nullptr, nullptr};
  const int level = static_cast<int>(std::clamp<std::int64_t>(priority, INT32_MIN, INT32_MAX));
  try {
    if (lease)
      begin_lease(client, pending);
    else if (swapped_out)
      pending.ticket = runtime_.swap(model_of(swapped_out), selection.model, level);
    else
      pending.ticket = runtime_.prewarm(selection, level, deadline, evict_below);
  } catch (const Error&) {
    fail(client, pending, std::current_exception());
  }
  if (pending.left.empty()) return;  // refused
  // Only the lease brings the layers: it waits for its turn.
  if (lease)
    for (Pending& earlier : client.pending)
      if (earlier.ticket && earlier.wanted.model == selection.model)
        earlier.left.remove(selection.layers);
  client.pending.push_back(std::move(pending));
}

void BrokerServer::cancel(Client& client, Reader body) {
  const std::uint64_t request = body.number();
  const std::uint32_t index = body.small_number();
  body.end();
  for (Pending& pending : client.pending) {
    if (pending.request != request || !pending.left.contains(index)) continue;
    LayerSet one;
    one.insert(index);
    pending.left.remove(one);
    send_error(client, request, cancelled("the request was cancelled"),
               Writer().number(pending.wanted.model->id).numbers({index}).take());
  }
}

// Carries the eviction out in a thread of its own, because it may wait for clients.
void BrokerServer::evict(Client& client, const Message& message) {
  Reader body(message.body);
  const Selection selection = selection_of(body);
  const std::uint32_t wait_for = body.small_number();
  const Deadline deadline = deadline_in(body.number());
  body.end();
  if (wait_for > static_cast<std::uint32_t>(WaitFor::leases_and_streams))
    throw Error(ErrorKind::general, "a message names an unknown way to wait");
  for (auto each = evictions_.begin(); each != evictions_.end();) {
    if (each->done) each->thread.join();  // it only has to return
    each = each->done ? evictions_.erase(each) : std::next(each);
  }
  if (std::ranges::count(evictions_, client.id, &Eviction::client) >= kMostEvictions) {
    send_error(client, message.request,
               std::make_exception_ptr(Error(
                   ErrorKind::busy, "this client waits for " + std::to_string(kMostEvictions) +
                                        " evictions already, the most that a broker accepts")));
    return;
  }
  const auto asker =
      std::ranges::find_if(clients_, [&](const ClientPtr& each) { return each.get() == &client; });
  Eviction& eviction = evictions_.emplace_back();
  eviction.client = client.id;
  try {
    eviction.thread = std::thread([this, &eviction, request = message.request, selection, wait_for,
                                   deadline, of = std::weak_ptr(*asker)] {
      carry_out(of, request, selection, static_cast<WaitFor>(wait_for), deadline);
      const std::lock_guard lock(mutex_);
      eviction.done = true;
    });
  } catch (const std::system_error& error) {
    evictions_.pop_back();
    send_error(client, message.request,
               std::make_exception_ptr(
                   Error(ErrorKind::general, os_failure("starting a thread that evicts",
                                                        error.code().value(), OsLimit::threads))));
  }
}

void BrokerServer::carry_out(const std::weak_ptr<Client>& of, std::uint64_t request,
                             const Selection& selection, WaitFor wait_for, Deadline deadline) {
  std::exception_ptr error;
  try {
    const Poll poll = [&] {
      const std::lock_guard lock(mutex_);
      const ClientPtr asker = of.lock();
      if (stopping_ || !asker || asker->ended)
        throw Error(ErrorKind::cancelled, "the client has ended");
    };
    runtime_.evict(selection, deadline, poll, wait_for);
  } catch (const Error&) {
    error = std::current_exception();
  }
  const std::lock_guard lock(mutex_);
  const ClientPtr asker = of.lock();
  if (!asker) return;
  if (error)
    send_error(*asker, request, error);
  else
    send(*asker, {.op = Op::done, .request = request});
}

void BrokerServer::keep(Client&, Reader body) {
  const ModelPtr model = model_of(body.number());
  std::vector<double> values(body.count(sizeof(double)));
  for (double& value : values) value = body.real();
  body.end();
  if (std::ranges::any_of(values, [](double value) { return std::isnan(value); }))
    throw Error(ErrorKind::general, "a message has a keep value that is no number");
  runtime_.set_keep_values(model, values);
}

void BrokerServer::status(Client& client, std::uint64_t request) {
  const RuntimeState state = runtime_.state();
  Writer writer;
  writer.number(state.granule_bytes).number(state.granules).number(state.granules_free);
  writer.number(state.counters.bytes_loaded);
  writer.number(state.models.size());
  for (const ModelState& model : state.models) {
    std::uint64_t bytes = 0, resident = 0;
    for (const LayerState& layer : model.layers) {
      bytes += layer.bytes;
      if (layer.residency == Residency::resident) resident += layer.bytes;
    }
    writer.text(model.name).number(bytes).number(resident).number(model.leases);
  }
  const auto shown = [](const ClientPtr& each) { return each->welcome; };
  writer.number(static_cast<std::uint64_t>(std::ranges::count_if(clients_, shown)));
  for (const ClientPtr& each : clients_) {
    if (!shown(each)) continue;
    writer.number(each->id).number(each->pid).text(each->name);
    writer.number(each->stuck).number(each->ended);
    writer.number(each->mapped.size());
    for (const auto& [id, layers] : each->mapped) {
      const ModelPtr model = model_of(id);
      std::uint64_t count = 0, held = 0, bytes = 0;
      layers.for_each([&](std::uint32_t index) {
        ++count;
        bytes += model->layers[index].bytes;
        held += std::any_of(each->holds.begin(), each->holds.end(), [&](const Hold& hold) {
          return hold.model == model && hold.layers.contains(index);
        });
      });
      writer.text(model->name).number(count).number(held).number(bytes);
    }
  }
  send(client, {.op = Op::done, .request = request, .body = writer.take()});
}

}  // namespace warmserve
