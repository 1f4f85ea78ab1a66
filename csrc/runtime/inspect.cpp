// The runtime's operations on tickets, and its readers: read_back(), digest() and state().
#include <algorithm>
#include <cstring>
#include <utility>

#include "runtime/runtime.h"

namespace warmserve {
namespace {

// Small enough for the cores' caches, so that the second copy of a read_back() is fast.
constexpr std::uint64_t kReaderBytes = 1 * kMiB;

}  // namespace

// A stream, and pinned memory that its work writes. It is kept from call to call, because releasing
// pinned memory waits for every stream of a CUDA context.
struct Runtime::Reader {
  explicit Reader(const DevicePtr& device) : region(device, kReaderBytes), stream(device) {}
  PinnedRegion region;
  Stream stream;
};

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

// Runs work(reader, layer) while the layer is kept resident. When `work` returns normally, all its
// device work has ended. When it throws, device work may still run; then the reader is not used
// again, and a use of the layer keeps it until that work ends.
void Runtime::with_resident(const ModelPtr& model, std::uint32_t index,
                            const std::function<void(Reader&, const Layer&)>& work) {
  std::shared_ptr<Reader> reader;
  FencePtr fence;
  Lock lock = lock_alive();
  require_registered(lock, *model);
  Layer& layer = layer_of(*model, index);
  wait_until(lock, kNever, nullptr, [&] { return !layer.busy; });
  if (layer.residency != Residency::resident)
    throw Error(ErrorKind::stale_view, "layer " + std::to_string(index) + " of '" + model->name +
                                           "' is " + to_string(layer.residency));
  if (!layer.bytes) return;
  state_.mark_busy(lock, layer);  // keeps the layer from eviction
  if (!readers_.empty()) {
    reader = std::move(readers_.back());
    readers_.pop_back();
  }
  lock.unlock();
  std::exception_ptr error;
  try {
    if (!reader) reader = std::make_shared<Reader>(device_);
    work(*reader, layer);
  } catch (...) {
    error = std::current_exception();
    if (reader)
      fence = std::make_shared<const Fence>(std::shared_ptr<Stream>(reader, &reader->stream));
  }
  lock.lock();
  state_.mark_idle(lock, layer);
  if (fence) {
    LayerSet used;
    used.insert(index);
    model->uses.push_back({fence, used});
  } else if (reader) {
    readers_.push_back(std::move(reader));
  }
  state_.wake();
  if (error) std::rethrow_exception(error);
}

void Runtime::read_back(const ModelPtr& model, std::uint32_t index, std::byte* out) {
  with_resident(model, index, [&](Reader& reader, const Layer& layer) {
    const Address from = model->reservation->address() + layer.offset;
    for (std::uint64_t at = 0; at < layer.bytes; at += kReaderBytes) {
      const std::uint64_t bytes = std::min(kReaderBytes, layer.bytes - at);
      reader.stream.copy_from_device(reader.region.data(), from + at, bytes);
      reader.stream.synchronize();
      std::memcpy(out + at, reader.region.data(), bytes);
    }
  });
}

std::vector<std::uint64_t> Runtime::digest(const ModelPtr& model, std::uint32_t index,
                                           std::uint64_t piece_bytes) {
  const std::string& none = device_->facts().no_kernels;
  if (!none.empty())
    throw Error(ErrorKind::general, device_->facts().name + " has no kernels: " + none);
  if (piece_bytes == 0) throw Error(ErrorKind::invalid_argument, "a piece must have bytes");
  std::vector<std::uint64_t> digests(ceil_div(layer_of(*model, index).bytes, piece_bytes));
  constexpr std::uint64_t kMost = kReaderBytes / sizeof(std::uint64_t);  // pieces of one launch
  with_resident(model, index, [&](Reader& reader, const Layer& layer) {
    const Address from = model->reservation->address() + layer.offset;
    for (std::uint64_t first = 0; first < digests.size(); first += kMost) {
      const std::uint64_t count = std::min<std::uint64_t>(kMost, digests.size() - first);
      const std::uint64_t begin = first * piece_bytes;
      const std::uint64_t bytes = std::min(count * piece_bytes, layer.bytes - begin);
      reader.stream.launch(DigestCall{from + begin, bytes, piece_bytes,
                                      reinterpret_cast<Address>(reader.region.data())});
      reader.stream.synchronize();
      std::memcpy(digests.data() + first, reader.region.data(), count * sizeof digests[0]);
    }
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
