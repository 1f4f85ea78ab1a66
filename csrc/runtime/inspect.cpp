// The runtime's operations on tickets, and its readers: read_back(), digest() and state().
#include <algorithm>
#include <cstring>
#include <utility>

#include "runtime/runtime.h"

namespace warmserve {
namespace {

// A stream and the memory that its work writes.
struct ReadBack {
  ReadBack(const DevicePtr& device, std::uint64_t size)
      : bytes(new std::byte[size]), stream(device) {}
  std::unique_ptr<std::byte[]> bytes;
  Stream stream;
};
struct Digest {
  Digest(const DevicePtr& device, std::uint64_t size)
      : region(device, ceil_div(size, 4 * kKiB) * 4 * kKiB), stream(device) {}
  PinnedRegion region;
  Stream stream;
};

}  // namespace

bool Runtime::done(const TicketPtr& ticket) {
  enter();
  const Lock lock = state_.lock();
  return ticket->done;
}

std::pair<std::uint64_t, std::uint64_t> Runtime::progress(const TicketPtr& ticket) {
  enter();
  const Lock lock = state_.lock();
  return {ticket->bytes_done, ticket->bytes_total};
}

std::pair<std::size_t, std::size_t> Runtime::layers_left(const TicketPtr& ticket) {
  enter();
  const Lock lock = state_.lock();
  std::size_t all = 0;
  for (const Selection& wanted : ticket->wants) wanted.for_each([&](const Layer&) { ++all; });
  return {ticket->loads.size(), all};
}

int Runtime::fileno(const TicketPtr& ticket) {
  enter();
  const Lock lock = state_.lock();
  return ticket->fileno(lock);
}

bool Runtime::notify(const TicketPtr& ticket, const std::shared_ptr<Waker>& waker,
                     std::uint64_t token) {
  enter();
  const Lock lock = state_.lock();
  return ticket->notify(lock, waker, token);
}

int Runtime::fileno() {
  const Lock lock = lock_open();
  return state_.epochs.descriptor();
}

void Runtime::wait(const TicketPtr& ticket, Deadline deadline, const Poll& poll) {
  enter();
  Lock lock = state_.lock();
  if (!wait_until(lock, deadline, poll, [&] { return ticket->done; })) {
    std::string who;
    for (const Holder& holder : state_.holders(lock))
      if (holder.leased) who += (who.empty() ? "; leased: '" : ", '") + holder.name + "'";
    throw Error(ErrorKind::timeout,
                ticket->what + " did not finish in time: " + format_bytes(ticket->bytes_done) +
                    " of " + format_bytes(ticket->bytes_total) + " arrived" + who);
  }
  if (ticket->error) std::rethrow_exception(ticket->error);
}

void Runtime::wait(const TicketPtr& ticket, const ModelPtr& model, std::uint32_t index,
                   Deadline deadline, const Poll& poll) {
  const Layer& layer = layer_of(*model, index);
  if (!ticket->wants_layer(layer))
    throw Error(ErrorKind::invalid_argument, ticket->what + " does not include layer " +
                                                 std::to_string(index) + " of '" + model->name +
                                                 "'");
  enter();
  Lock lock = state_.lock();
  const auto over = [&] {
    LayerLoad* const load = ticket->to_host ? layer.host_load : layer.load;
    return !load || !ticket->loads.contains(load);
  };
  if (!wait_until(lock, deadline, poll, over))
    throw Error(ErrorKind::timeout, "layer " + std::to_string(index) + " of '" + model->name +
                                        "' did not arrive in time");
  if (layer.residency == Residency::resident) return;
  if (ticket->error) std::rethrow_exception(ticket->error);
  if (ticket->partial_error) std::rethrow_exception(ticket->partial_error);
}

void Runtime::cancel(const TicketPtr& ticket) {
  enter();
  const Lock lock = state_.lock();
  if (!ticket->done) loader_.drop(lock, ticket, cancelled(ticket->what + " was cancelled"));
}

// Runs work(*made) while the layer is kept resident. When `work` returns normally, all its device
// work has ended. When it throws, device work may still run; then `made`, which owns the stream and
// the memory that the work writes, is kept as a use of the layer until that work ends.
template <typename Made>
void Runtime::with_resident(const ModelPtr& model, std::uint32_t index,
                            const std::function<std::shared_ptr<Made>()>& make,
                            const std::function<void(Made&, const Layer&)>& work) {
  Lock lock = lock_alive();
  require_registered(lock, *model);
  Layer& layer = layer_of(*model, index);
  wait_until(lock, kNever, nullptr, [&] { return !layer.busy; });
  if (layer.residency != Residency::resident)
    throw Error(ErrorKind::stale_view, "layer " + std::to_string(index) + " of '" + model->name +
                                           "' is " + to_string(layer.residency));
  if (!layer.bytes) return;
  state_.mark_busy(lock, layer);  // keeps the layer from eviction
  lock.unlock();
  std::shared_ptr<Made> made;
  std::exception_ptr error;
  try {
    made = make();
    work(*made, layer);
    made.reset();  // without the lock: destroying the stream may block
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  state_.mark_idle(lock, layer);
  if (error && made) {
    LayerSet used;
    used.insert(index);
    model->uses.push_back(
        {std::make_shared<const Fence>(std::shared_ptr<Stream>(made, &made->stream)), used});
  }
  state_.wake();
  if (error) std::rethrow_exception(error);
}

void Runtime::read_back(const ModelPtr& model, std::uint32_t index, std::byte* out) {
  with_resident<ReadBack>(
      model, index,
      [&] { return std::make_shared<ReadBack>(device_, layer_of(*model, index).bytes); },
      [&](ReadBack& read, const Layer& layer) {
        read.stream.copy_from_device(read.bytes.get(), model->reservation->address() + layer.offset,
                                     layer.bytes);
        read.stream.synchronize();
        std::memcpy(out, read.bytes.get(), layer.bytes);
      });
}

std::vector<std::uint64_t> Runtime::digest(const ModelPtr& model, std::uint32_t index) {
  const std::string& none = device_->facts().no_kernels;
  if (!none.empty())
    throw Error(ErrorKind::general, device_->facts().name + " has no kernels: " + none);
  std::vector<std::uint64_t> digests(layer_of(*model, index).granules_needed);
  const std::uint64_t size = digests.size() * sizeof digests[0];
  with_resident<Digest>(
      model, index, [&] { return std::make_shared<Digest>(device_, size); },
      [&](Digest& digest, const Layer& layer) {
        digest.stream.launch(DigestCall{model->reservation->address() + layer.offset, layer.bytes,
                                        arena_.granule_bytes(),
                                        reinterpret_cast<Address>(digest.region.data())});
        digest.stream.synchronize();
        std::memcpy(digests.data(), digest.region.data(), size);
      });
  return digests;
}

RuntimeState Runtime::state() {
  enter();  // before any lock: a forked child may have inherited a lock in locked state
  RuntimeState state;
  state.headroom_bytes = arena_.headroom();
  state.pinned_bytes = staging_.pinned_bytes();
  state.staging_chunks_free = staging_.available();
  state.host_cache.slabs = host_slabs_.state();
  const Lock lock = lock_open();
  state.granule_bytes = arena_.granule_bytes();
  state.granules = arena_.capacity();
  state.granules_free = arena_.free_count();
  state.granules_trimmed = arena_.trimmed_count();
  state.leases = lease_queue_.leases();
  state.counters = state_.counters;
  state.host_cache.counters = host_cache_.counters(lock);
  state.host_cache.layers = host_cache_.images(lock);
  state.routes = loader_.routes();
  for (const auto& [name, model] : state_.models) {
    ModelState& shown = state.models.emplace_back();
    shown.name = name;
    shown.leases = model->leases;
    shown.backing_epoch = model->backing_epoch.load(std::memory_order_acquire);
    for (const Layer& layer : model->layers)
      shown.layers.push_back({layer.residency, layer.bytes, layer.granules_needed,
                              layer.holds - layer.passes + model->whole_holds - model->whole_passes,
                              layer.keep_value, layer.image != nullptr});
  }
  return state;
}

}  // namespace warmserve
