// The class Runtime: construction, registration, prewarm and swap.
#include "runtime/runtime.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/digest_parts.h"
#include "model/content_key.h"

namespace warmserve {
namespace {

// Sets the digests that the layer's granules must have. Computes those that are not given from the
// files.
void take_digests(const Model& model, Layer& layer, const std::vector<GranuleCheck>& checks,
                  const GranuleCut& cut, const Poll& poll) {
  std::vector<std::byte> memory;
  std::vector<ExpectedDigest> taken;
  for (const auto& [granule, digest] : checks) {
    if (granule >= layer.granules_needed || (!taken.empty() && granule <= taken.back().granule))
      throw Error(ErrorKind::invalid_argument,
                  "the checks of a layer of '" + model.name +
                      "' must be in ascending order of granules and inside the layer");
    taken.push_back({granule, digest.value_or(0)});
    if (digest) continue;
    memory.resize(cut.granule_bytes);
    const std::uint64_t begin = cut.begin(granule), bytes = cut.end(granule) - begin;
    read_layer(model.files, layer.source, begin, begin + bytes,
               {begin, cut.granule_bytes, {memory.data()}});
    taken.back().digest = digest_of_parts(digest_part(memory.data(), bytes, 0), bytes);
    if (poll) poll();
  }
  layer.source.digests = std::move(taken);
}

}  // namespace

Runtime::Runtime(DevicePtr device, const RuntimeOptions& options)
    : device_(std::move(device)),
      arena_(device_, {.bytes = options.arena_bytes,
                       .granule_bytes = options.granule_bytes,
                       .headroom_bytes = options.headroom_bytes,
                       .poison = options.poison,
                       .imported = options.broker != nullptr}),
      staging_(device_, options.staging_bytes, options.chunk_bytes),
      host_slabs_(device_, arena_.filled_by_host() ? 0 : options.host_cache_bytes,
                  options.loaders > 0),
      state_(arena_, options.fence_device),
      attachment_(options.broker ? std::make_unique<Attachment>(state_, options.broker) : nullptr),
      host_cache_(state_, host_slabs_),
      lease_queue_(state_),
      loader_(state_, staging_, host_cache_,
              {.loaders = options.loaders,
               .staging_timeout = options.staging_timeout,
               .background_share = options.background_share,
               .read_bandwidth = options.read_bandwidth}) {
  if (attachment_)
    attachment_->start(
        loader_, options.loaders > 0,
        [this](const Lock& lock, const Selection& wanted) { return give_up(lock, wanted); });
}

std::shared_ptr<Runtime> Runtime::make(std::shared_ptr<Driver> driver,
                                       const RuntimeOptions& options) {
  const auto device = std::make_shared<Device>(std::move(driver));
  try {
    return {new Runtime(device, options), [](Runtime* runtime) {
              if (runtime->device_->usable()) delete runtime;
            }};
  } catch (...) {
    device->retry_releases();
    throw;
  }
}

Runtime::~Runtime() {
  try {
    close(nullptr);
  } catch (...) {  // the destructors of the members free what the device still releases
  }
  state_.clients.reset();                // its threads use the members, too
  if (attachment_) attachment_->stop();  // its thread uses members that are destroyed before it
}

void Runtime::enter() const {
  if (!device_->usable())
    throw Error(ErrorKind::general, "this runtime belongs to the process that forked this one");
}

Lock Runtime::lock_open() {
  enter();
  Lock lock = state_.lock();
  if (closed_) throw Error(ErrorKind::general, "the runtime is closed");
  return lock;
}

Lock Runtime::lock_alive() {
  Lock lock = lock_open();
  device_->require_alive();
  return lock;
}

void Runtime::check(const Lock& lock, const Selection& selection) const {
  const Model& model = *selection.model;
  require_registered(lock, model);
  if (selection.layers.end() > model.layers.size())
    throw Error(ErrorKind::invalid_argument,
                "'" + model.name + "' has " + std::to_string(model.layers.size()) +
                    " layers, but the selection names a layer beyond them");
  if (selection.layers.empty() && !model.layers.empty())
    throw Error(ErrorKind::invalid_argument, "no layers of '" + model.name + "' are named");
}

void Runtime::require_registered(const Lock&, const Model& model) const {
  if (model.runtime != this || !model.registered)
    throw Error(ErrorKind::invalid_argument, "'" + model.name + "' is not registered here");
}

// Waits until done(); the lock is released while it waits. Returns false at the deadline.
bool Runtime::wait_until(Lock& lock, Deadline deadline, const Poll& poll,
                         const std::function<bool()>& done) {
  while (!done()) {
    if (Clock::now() >= deadline) return false;
    if (loader_.pump(lock)) {
      lock.unlock();
      const bool moved = loader_.step();
      lock.lock();
      if (!moved && !closed_ && !done())
        throw Error(ErrorKind::busy, "this wait cannot end: no step can make progress");
      if (!moved && !done()) state_.changed.wait_until(lock, Clock::now() + kPollInterval);
    } else {
      state_.changed.wait_until(lock, std::min(deadline, Clock::now() + kPollInterval));
    }
    if (poll && !done()) {
      lock.unlock();
      poll();
      lock.lock();
    }
  }
  return true;
}

// Builds a model without registering it.
ModelPtr Runtime::make_model(const std::string& name, std::vector<File> files,
                             const std::vector<LayerShape>& layers, const Poll& poll) const {
  check_layout(name, files, layers, arena_.granule_bytes());
  auto model = std::make_shared<Model>();
  model->name = name;
  model->runtime = this;
  model->files = std::move(files);
  for (const LayerShape& shape : layers) {
    Layer& layer = model->layers.emplace_back();
    layer.model = model.get();
    layer.index = static_cast<std::uint32_t>(model->layers.size() - 1);
    layer.bytes = shape.bytes;
    layer.offset = model->granules * arena_.granule_bytes();
    layer.granules_needed = arena_.granules_of(shape.bytes);
    layer.source.segments = shape.segments;
    const GranuleCut cut{arena_.granule_bytes(), layer.bytes};
    take_digests(*model, layer, shape.checks, cut, poll);
    if (arena_.id()) layer.key = content_key(*model, layer);
    model->granules += layer.granules_needed;
    model->bytes += shape.bytes;
  }
  model->missing = static_cast<std::uint32_t>(model->layers.size());
  return model;
}

ModelPtr Runtime::register_model(const std::string& name, std::vector<File> files,
                                 const std::vector<LayerShape>& layers, bool writable,
                                 const Poll& poll) {
  if (writable) refuse_client("a writable model");
  const ModelPtr model = make_model(name, std::move(files), layers, poll);
  model->writable = writable;
  if (writable)
    for (Layer& layer : model->layers) layer.key = {};
  if (attachment_) {
    {
      const Lock lock = lock_alive();
      if (state_.models.contains(name))
        throw Error(ErrorKind::invalid_argument, "a model '" + name + "' is registered already");
    }
    attachment_->enroll(model, poll);
  }
  const Lock lock = lock_alive();
  if (state_.models.contains(name))
    throw Error(ErrorKind::invalid_argument, "a model '" + name + "' is registered already");
  model->id = ++next_id_;
  state_.models.emplace(name, model);
  return model;
}

void Runtime::reload(const ModelPtr& model, std::vector<File> files,
                     const std::vector<LayerShape>& layers, Deadline deadline, const Poll& poll) {
  refuse_client("reload()");
  // Declared before the lock, so that the old files, which are swapped into it, are closed without
  // the lock.
  const ModelPtr made = make_model(model->name, std::move(files), layers, poll);
  const auto bytes_of = [](const Layer& layer) { return layer.bytes; };
  if (!std::ranges::equal(made->layers, model->layers, {}, bytes_of, bytes_of))
    throw Error(ErrorKind::invalid_argument,
                "'" + model->name + "' is registered with layers of other sizes");
  Lock lock = lock_alive();
  require_registered(lock, *model);
  const auto any_host_load = [&] {
    return std::ranges::any_of(model->layers, [](const Layer& layer) { return layer.host_load; });
  };
  do {
    evict_locked(lock, model, deadline, poll, WaitFor::streams);
    require_registered(lock, *model);  // another thread may have unregistered it meanwhile
    loader_.drop_host_layers(lock, model, cancelled("'" + model->name + "' was reloaded"));
    if (!wait_until(lock, deadline, poll, [&] { return !any_host_load(); }))
      throw Error(ErrorKind::timeout, "'" + model->name + "' was still being read");
    require_registered(lock, *model);
  } while (model->leases + model->passes + model->layers.size() - model->missing);
  host_cache_.drop(lock, *model);
  model->files.swap(made->files);
  for (Layer& layer : model->layers) {
    std::swap(layer.source, made->layers[layer.index].source);
    if (layer.key) layer.key = made->layers[layer.index].key;
  }
}

ReservationPtr Runtime::reservation(const ModelPtr& model) {
  {
    const Lock lock = lock_alive();
    require_registered(lock, *model);
    if (model->reservation) return model->reservation;
  }
  ReservationPtr made =
      arena_.reserve(std::max<std::uint64_t>(model->granules, 1) * arena_.granule_bytes());
  const Lock lock = lock_alive();
  require_registered(lock, *model);
  if (!model->reservation) model->reservation = std::move(made);
  model->reserved.store(true, std::memory_order_release);
  return model->reservation;
}

// Throws unless the layers fit beside the layers that leases and passes hold.
void Runtime::require_room(const Lock& lock, const Selection& selection,
                           const std::string& what) const {
  if (state_.held_granules + state_.granules_to_hold(lock, selection) <= arena_.capacity()) return;
  std::uint64_t granules = 0;  // of one model, so neither the count nor its bytes can overflow
  selection.for_each([&](const Layer& layer) { granules += layer.granules_needed; });
  throw no_room(granules <= arena_.capacity() ? ErrorKind::busy : ErrorKind::out_of_device_memory,
                what, granules * arena_.granule_bytes(), arena_.budget(), state_.holders(lock));
}

TicketPtr Runtime::prewarm(const Selection& selection, int priority, Deadline deadline,
                           double evict_below) {
  if (std::isnan(evict_below))
    throw Error(ErrorKind::invalid_argument, "evict_below must be a number, got nan");
  if (deadline <= Clock::now())
    throw Error(ErrorKind::invalid_argument, "the deadline has already passed");
  const ModelPtr& model = selection.model;
  auto ticket = std::make_shared<Ticket>("prewarm of '" + model->name + "'", priority,
                                         std::vector{selection}, deadline, evict_below);
  reservation(model);
  const Lock lock = lock_alive();
  check(lock, selection);
  require_room(lock, selection, ticket->what);
  if (evict_below != kNoLimit && !loader_.has_room(lock, *ticket))
    throw Error(ErrorKind::busy, ticket->what +
                                     " does not fit beside the layers that are leased, being "
                                     "loaded, or of a keep value of evict_below or more");
  loader_.request(lock, ticket);
  return ticket;
}

TicketPtr Runtime::prewarm_host(const Selection& selection, int priority, Deadline deadline) {
  if (deadline <= Clock::now())
    throw Error(ErrorKind::invalid_argument, "the deadline has already passed");
  const auto ticket =
      std::make_shared<Ticket>("prewarm of '" + selection.model->name + "'", priority,
                               std::vector{selection}, deadline, kNoLimit, true);
  const HostSlabs::State slabs = host_slabs_.state();
  const Lock lock = lock_alive();
  check(lock, selection);
  if (!slabs.budget_bytes)
    throw Error(ErrorKind::invalid_argument,
                arena_.filled_by_host()
                    ? device_->facts().name + " needs no host cache: the CPU writes its memory"
                    : "this runtime has no host cache: give Runtime(host_cache=)");
  std::uint64_t need = 0;  // of one model, so it cannot overflow
  selection.for_each([&](const Layer& layer) { need += HostImage::bytes_for(layer); });
  const std::uint64_t most = slabs.error.empty() ? slabs.budget_bytes : slabs.pinned_bytes;
  if (need > most)
    throw Error(ErrorKind::invalid_argument, ticket->what + " to the host cache needs " +
                                                 format_bytes(need) + " of a budget of " +
                                                 format_bytes(most) +
                                                 (slabs.error.empty() ? "" : "; " + slabs.error));
  loader_.request(lock, ticket);
  return ticket;
}

TicketPtr Runtime::swap(const ModelPtr& evict, const ModelPtr& load, int priority) {
  if (evict == load)
    throw Error(ErrorKind::invalid_argument, "a model cannot be swapped for itself");
  auto ticket = std::make_shared<Ticket>("swap of '" + evict->name + "' for '" + load->name + "'",
                                         priority, std::vector{Selection(load)});
  reservation(load);
  const Lock lock = lock_alive();
  require_registered(lock, *load);
  require_registered(lock, *evict);
  const Selection all(evict);
  recall_guards(lock, &all);
  if (evict->leases + evict->passes) throw Error(ErrorKind::busy, why_busy(*evict));
  require_room(lock, load, ticket->what);
  loader_.drop_layers(lock, evict, cancelled("'" + evict->name + "' was swapped out"));
  ticket->swapped_out = evict;
  loader_.request(lock, ticket);
  return ticket;
}

void Runtime::set_keep_value(const ModelPtr& model, double value) {
  const Lock lock = lock_alive();
  require_registered(lock, *model);
  for (Layer& layer : model->layers) state_.set_keep_value(lock, layer, value);
  if (attachment_) attachment_->keep(lock, *model);
}

void Runtime::set_keep_value(const ModelPtr& model, std::uint32_t layer, double value) {
  const Lock lock = lock_alive();
  require_registered(lock, *model);
  state_.set_keep_value(lock, layer_of(*model, layer), value);
  if (attachment_) attachment_->keep(lock, *model);
}

void Runtime::set_keep_values(const ModelPtr& model, const std::vector<double>& values) {
  if (values.size() != model->layers.size())
    throw Error(ErrorKind::invalid_argument,
                "'" + model->name + "' has " + std::to_string(model->layers.size()) +
                    " layers: give as many keep values, not " + std::to_string(values.size()));
  const Lock lock = lock_alive();
  require_registered(lock, *model);
  for (Layer& layer : model->layers) state_.set_keep_value(lock, layer, values[layer.index]);
  if (attachment_) attachment_->keep(lock, *model);
}

Layer& Runtime::layer_of(Model& model, std::uint32_t index) {
  if (index >= model.layers.size())
    throw Error(ErrorKind::invalid_argument, "'" + model.name + "' has " +
                                                 std::to_string(model.layers.size()) +
                                                 " layers, got layer " + std::to_string(index));
  return model.layers[index];
}

void Runtime::add_route(const RoutePtr& route) {
  const Lock lock = lock_alive();
  if (arena_.filled_by_host())
    throw Error(ErrorKind::invalid_argument,
                "no route can be added to " + device_->facts().name +
                    ": the CPU writes its memory directly, over no link");
  loader_.add_route(route);
}

void Runtime::drop_route(const std::string& name) {
  enter();
  loader_.drop_route(name);
}

bool Runtime::step() {
  {
    const Lock lock = lock_alive();
    if (!loader_.pump(lock))
      throw Error(ErrorKind::invalid_argument, "step() requires Runtime(pump=True)");
  }
  return loader_.step();
}

void Runtime::check_invariants() {
  const Lock lock = lock_open();
  state_.check_invariants(lock);
  loader_.check_invariants(lock);
  host_cache_.check_invariants(lock);
}

}  // namespace warmserve
