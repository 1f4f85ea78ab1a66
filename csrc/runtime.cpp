// The runtime: its life, its models, and what moves them in and out.
#include "runtime.h"

#include <algorithm>
#include <utility>

#include "kernels/digest_parts.h"

namespace warmserve {
namespace {

// Whether a cast would take anything but whole elements.
bool cuts_elements(const Segment& segment) {
  if (!segment.cast) return false;
  const std::uint64_t width = widths(*segment.cast).to;
  return width == 0 || segment.layer_offset % width || segment.bytes % width;
}

// The rest of the library trusts these: a wrong offset would be a write out of bounds.
void check_shape(const std::string& name, const std::vector<File>& files,
                 const std::vector<LayerShape>& layers) {
  for (const LayerShape& layer : layers) {
    std::uint64_t end = 0;
    if (layer.bytes > kGiB * kKiB)
      throw Error(ErrorKind::invalid_argument, "a layer of '" + name + "' is too large");
    for (const Segment& segment : layer.segments) {
      if (segment.file >= files.size() || segment.layer_offset < end ||
          segment.bytes > layer.bytes || segment.layer_offset > layer.bytes - segment.bytes)
        throw Error(ErrorKind::invalid_argument,
                    "a segment of '" + name + "' is out of order or outside of its layer");
      if (cuts_elements(segment))
        throw Error(ErrorKind::invalid_argument, "a cast of '" + name + "' cuts elements");
      end = segment.layer_offset + segment.bytes;
    }
  }
}

// Gives a layer the digests that it must have, read from the files where none is given.
void take_digests(const Model& model, Layer& layer, const std::vector<GranuleCheck>& checks,
                  const GranuleCut& cut, const Poll& poll) {
  std::vector<std::byte> memory;
  std::vector<ExpectedDigest> taken;
  for (const auto& [granule, digest] : checks) {
    if (granule >= layer.granules_needed || (!taken.empty() && granule <= taken.back().granule))
      throw Error(ErrorKind::invalid_argument,
                  "a digest of '" + model.name + "' is out of order or outside of its layer");
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

// For the time of its scope somebody waits for leases to end. Under the runtime's lock.
class Wanted {
 public:
  explicit Wanted(unsigned& count) : count_(count) { ++count_; }
  ~Wanted() { --count_; }
  Wanted(const Wanted&) = delete;

 private:
  unsigned& count_;
};

}  // namespace

Runtime::Runtime(DevicePtr device, const RuntimeOptions& options)
    : device_(std::move(device)),
      arena_(device_,
             {options.arena_bytes, options.granule_bytes, options.headroom_bytes, options.poison}),
      staging_(device_, options.staging_bytes, options.chunk_bytes),
      books_(arena_),
      desk_(books_),
      transfer_(books_, staging_,
                {options.loaders, options.staging_timeout, options.background_share,
                 options.read_bandwidth}) {}

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
  } catch (...) {  // the members free what the device lets them
  }
}

void Runtime::enter() const {
  if (!device_->usable())
    throw Error(ErrorKind::general, "this runtime belongs to the process that forked this one");
}

Lock Runtime::look() {
  enter();
  Lock lock(books_.mutex);
  if (closed_) throw Error(ErrorKind::general, "the runtime is closed");
  return lock;
}

Lock Runtime::open() {
  Lock lock = look();
  device_->require_alive();
  return lock;
}

void Runtime::check(const Lock& lock, const Selection& selection) const {
  const Model& model = *selection.model;
  require_registered(lock, model);
  if (!LayerSet::first(model.layers.size()).contains(selection.layers))
    throw Error(ErrorKind::invalid_argument,
                "'" + model.name + "' has " + std::to_string(model.layers.size()) + " layers only");
  if (selection.layers.empty() && !model.layers.empty())
    throw Error(ErrorKind::invalid_argument, "no layers of '" + model.name + "' are named");
}

void Runtime::require_registered(const Lock&, const Model& model) const {
  if (model.runtime != this || !model.registered)
    throw Error(ErrorKind::invalid_argument, "'" + model.name + "' is not registered here");
}

// Waits until done(), giving the lock away meanwhile. False at the deadline.
bool Runtime::wait_until(Lock& lock, Deadline deadline, const Poll& poll,
                         const std::function<bool()>& done) {
  while (!done()) {
    if (Clock::now() >= deadline) return false;
    if (transfer_.pump(lock)) {
      lock.unlock();
      const bool moved = transfer_.step();
      lock.lock();
      if (!moved && !closed_ && !done())
        throw Error(ErrorKind::busy, "nothing that can be stepped would end this wait");
      if (!moved && !done()) books_.changed.wait_until(lock, Clock::now() + kPollInterval);
    } else {
      books_.changed.wait_until(lock, std::min(deadline, Clock::now() + kPollInterval));
    }
    if (poll && !done()) {
      lock.unlock();
      poll();
      lock.lock();
    }
  }
  return true;
}

// A model that is not registered yet.
ModelPtr Runtime::make_model(const std::string& name, std::vector<File> files,
                             const std::vector<LayerShape>& layers, const Poll& poll) const {
  check_shape(name, files, layers);
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
    model->granules += layer.granules_needed;
    model->bytes += shape.bytes;
  }
  model->missing = static_cast<std::uint32_t>(model->layers.size());
  return model;
}

ModelPtr Runtime::register_model(const std::string& name, std::vector<File> files,
                                 const std::vector<LayerShape>& layers, bool writable,
                                 const Poll& poll) {
  const ModelPtr model = make_model(name, std::move(files), layers, poll);
  model->writable = writable;
  const Lock lock = open();
  if (books_.models.contains(name))
    throw Error(ErrorKind::invalid_argument, "a model '" + name + "' is registered already");
  model->id = ++next_id_;
  books_.models.emplace(name, model);
  return model;
}

void Runtime::reload(const ModelPtr& model, std::vector<File> files,
                     const std::vector<LayerShape>& layers, Deadline deadline, const Poll& poll) {
  // Its files are closed without the lock.
  const ModelPtr made = make_model(model->name, std::move(files), layers, poll);
  const auto bytes_of = [](const Layer& layer) { return layer.bytes; };
  if (!std::ranges::equal(made->layers, model->layers, {}, bytes_of, bytes_of))
    throw Error(ErrorKind::invalid_argument, "'" + model->name + "' has layers of other sizes");
  Lock lock = open();
  require_registered(lock, *model);
  do {
    evict_locked(lock, model, deadline, poll, Patience::streams);
    require_registered(lock, *model);  // another thread may have been faster
  } while (model->leases);
  model->files.swap(made->files);
  for (Layer& layer : model->layers) std::swap(layer.source, made->layers[layer.index].source);
}

// Takes a model off the books. What it had, which may be the last of a stream that has work left,
// is the caller's to free without the lock.
Runtime::Remains Runtime::take_off(const Lock&, Model& model) {
  model.registered = false;
  books_.models.erase(model.name);
  return {std::move(model.reservation), std::exchange(model.uses, {})};
}

void Runtime::unregister(const ModelPtr& model, Deadline deadline, const Poll& poll) {
  Remains remains;
  Lock lock = open();
  require_registered(lock, *model);
  do {
    evict_locked(lock, model, deadline, poll, Patience::streams);
    require_registered(lock, *model);  // another thread may have been faster
  } while (model->leases);
  const auto why = cancelled("'" + model->name + "' was unregistered");
  transfer_.drop_layers(lock, model, why);
  for (const HoldPtr& hold : desk_.turn_away(lock, model)) hold->entry->finish(books_, lock, why);
  while (const HoldPtr next = desk_.admit_next(lock)) serve(lock, next);
  remains = take_off(lock, *model);
}

ReservationPtr Runtime::reservation(const ModelPtr& model) {
  {
    const Lock lock = open();
    require_registered(lock, *model);
    if (model->reservation) return model->reservation;
  }
  ReservationPtr made =
      arena_.reserve(std::max<std::uint64_t>(model->granules, 1) * arena_.granule_bytes());
  const Lock lock = open();
  require_registered(lock, *model);
  if (!model->reservation) model->reservation = std::move(made);
  return model->reservation;
}

// Throws unless the layers would fit beside what is leased.
void Runtime::require_room(const Lock& lock, const Selection& selection,
                           const std::string& what) const {
  if (books_.held_granules + books_.granules_to_hold(lock, selection) <= arena_.capacity()) return;
  std::uint64_t granules = 0;
  selection.for_each([&](const Layer& layer) { granules += layer.granules_needed; });
  throw no_room(granules <= arena_.capacity() ? ErrorKind::busy : ErrorKind::out_of_device_memory,
                what, granules * arena_.granule_bytes(), arena_.budget(), books_.holders(lock));
}

TicketPtr Runtime::prewarm(const Selection& selection, int priority, Deadline deadline) {
  if (deadline <= Clock::now())
    throw Error(ErrorKind::invalid_argument, "a deadline that has passed");
  const ModelPtr& model = selection.model;
  auto ticket = std::make_shared<Ticket>("prewarm of '" + model->name + "'", priority,
                                         std::vector{selection}, deadline);
  reservation(model);
  const Lock lock = open();
  check(lock, selection);
  require_room(lock, selection, ticket->what);
  transfer_.request(lock, ticket);
  return ticket;
}

TicketPtr Runtime::swap(const ModelPtr& evict, const ModelPtr& load, int priority) {
  if (evict == load)
    throw Error(ErrorKind::invalid_argument, "a model cannot be swapped for itself");
  auto ticket = std::make_shared<Ticket>("swap of '" + evict->name + "' for '" + load->name + "'",
                                         priority, std::vector{Selection(load)});
  reservation(load);
  const Lock lock = open();
  require_registered(lock, *load);
  require_registered(lock, *evict);
  if (evict->leases) throw Error(ErrorKind::busy, "'" + evict->name + "' is leased");
  require_room(lock, load, ticket->what);
  transfer_.drop_layers(lock, evict, cancelled("'" + evict->name + "' was swapped out"));
  ticket->swapped_out = evict;
  transfer_.request(lock, ticket);
  return ticket;
}

void Runtime::evict(const Selection& selection, Deadline deadline, const Poll& poll,
                    Patience patience) {
  Lock lock = open();
  check(lock, selection);
  evict_locked(lock, selection, deadline, poll, patience);
}

void Runtime::evict_locked(Lock& lock, const Selection& selection, Deadline deadline,
                           const Poll& poll, Patience patience) {
  const std::string name = "'" + selection.model->name + "'";
  const auto none = [&](auto&& is) {
    bool found = false;
    selection.for_each([&](const Layer& layer) { found = found || is(layer); });
    return !found;
  };
  const auto free = [&] { return none([](const Layer& l) { return l.held(); }); };
  const auto gone = [&] {
    return none([](const Layer& l) { return l.residency != Residency::absent; });
  };
  const auto settled = [&] {  // nobody works on any of them
    return none([](const Layer& l) { return l.owned || l.residency == Residency::filling; });
  };
  const auto wait_for = [&](const std::function<bool()>& condition) {
    if (!wait_until(lock, deadline, poll, condition))
      throw Error(ErrorKind::timeout, name + " was not evicted in time");
  };
  do {
    if (!free()) {
      if (patience != Patience::leases_and_streams)
        throw Error(ErrorKind::busy, name + " is leased");
      const Wanted release(books_.release_wanted);
      wait_for(free);
    }
    const auto in_use = [&](const Use& use) {
      return use.layers.intersects(selection.layers) && !use.fence->complete();
    };
    if (const auto& uses = selection.model->uses;
        patience == Patience::none && std::any_of(uses.begin(), uses.end(), in_use))
      throw Error(ErrorKind::busy, "a stream still uses " + name);
    transfer_.drop_layers(lock, selection, cancelled(name + " was evicted"));
    std::vector<Layer*> layers;
    selection.for_each([&](Layer& layer) {
      if (!layer.owned && (layer.residency == Residency::resident || layer.torn))
        layers.push_back(&layer);
    });
    if (!layers.empty()) {
      std::vector<GranuleId> freed;
      books_.claim(lock, layers);
      try {
        drain(books_, lock, layers, deadline, poll, freed);
      } catch (...) {
        arena_.give(freed);
        throw;
      }
      arena_.give(freed);
    }
    wait_for(settled);
  } while (!gone());
}

std::uint64_t Runtime::trim() {
  Lock lock = open();
  return trim_locked(lock);
}

std::uint64_t Runtime::trim_locked(Lock& lock) {
  const std::vector<GranuleId> ids = arena_.take(arena_.free_count());
  books_.granules_in_hand += static_cast<std::uint32_t>(ids.size());
  lock.unlock();
  const std::size_t destroyed = arena_.destroy(ids);
  lock.lock();
  books_.granules_in_hand -= static_cast<std::uint32_t>(ids.size());
  arena_.return_uncreated(std::span(ids).first(destroyed));
  arena_.give(std::span(ids).subspan(destroyed));
  books_.wake();
  if (destroyed < ids.size())
    throw Error(ErrorKind::general, "the driver released " + std::to_string(destroyed) + " of " +
                                        std::to_string(ids.size()) + " granules");
  return destroyed * arena_.granule_bytes();
}

void Runtime::stamp(const ModelPtr& model, double value) {
  const Lock lock = open();
  require_registered(lock, *model);
  for (Layer& layer : model->layers) layer.keep_value = value;
}

void Runtime::stamp(const ModelPtr& model, std::uint32_t layer, double value) {
  const Lock lock = open();
  require_registered(lock, *model);
  layer_of(*model, layer).keep_value = value;
}

Layer& Runtime::layer_of(Model& model, std::uint32_t index) {
  if (index >= model.layers.size())
    throw Error(ErrorKind::invalid_argument, "'" + model.name + "' has " +
                                                 std::to_string(model.layers.size()) +
                                                 " layers and no layer " + std::to_string(index));
  return model.layers[index];
}

void Runtime::add_route(RoutePtr route) {
  const Lock lock = open();
  if (arena_.filled_by_host())
    throw Error(ErrorKind::invalid_argument,
                "a path to " + device_->facts().name + ": the CPU writes its memory, over no link");
  transfer_.add(std::move(route));
}

void Runtime::drop_route(const std::string& name) {
  enter();
  transfer_.drop_route(name);
}

bool Runtime::step() {
  {
    const Lock lock = open();
    if (!transfer_.pump(lock))
      throw Error(ErrorKind::invalid_argument, "step() is for Runtime(pump=True)");
  }
  return transfer_.step();
}

void Runtime::check_invariants() {
  const Lock lock = look();
  books_.check_invariants(lock);
}

void Runtime::close(const Poll& poll) {
  std::vector<Remains> remains;
  enter();
  Lock lock(books_.mutex);
  wait_until(lock, kNever, poll, [&] { return !closing_; });
  for (const Holder& holder : books_.holders(lock))
    if (holder.leased) throw Error(ErrorKind::busy, "close: '" + holder.name + "' is leased");
  if (desk_.active()) throw Error(ErrorKind::busy, "close: a model without bytes is leased");
  closed_ = closing_ = true;
  struct Closing {
    ~Closing() {
      if (!lock.owns_lock()) lock.lock();
      closing = false;
      books.wake();
    }
    Lock& lock;
    bool& closing;
    Books& books;
  } end{lock, closing_, books_};
  const auto why = cancelled("the runtime was closed");
  for (const auto& [name, model] : books_.models) transfer_.drop_layers(lock, model, why);
  transfer_.drop_swaps(lock, why);
  lock.unlock();
  transfer_.stop();
  lock.lock();
  while (!books_.models.empty()) {
    const ModelPtr model = books_.models.begin()->second;
    evict_locked(lock, model, kNever, poll, Patience::streams);
    if (model->registered) remains.push_back(take_off(lock, *model));  // else: by another thread
  }
  wait_until(lock, kNever, poll, [&] { return books_.granules_in_hand == 0; });
  if (arena_.free_count()) trim_locked(lock);
  lock.unlock();
  remains.clear();
  transfer_.release();
  staging_.release();
  arena_.release();
  if (!device_->retry_releases())
    throw Error(ErrorKind::general, "close: the driver does not take everything back");
}

}  // namespace warmserve
