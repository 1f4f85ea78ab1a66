// The runtime's operations on leases and passes: begin, share, wait, record, end.
#include <algorithm>
#include <utility>

#include "runtime/runtime.h"

namespace warmserve {

namespace {

// Uses of a model that are kept before those in the past are removed.
constexpr std::size_t kManyUses = 8;

// Adds a use. Adds the model to `crowded` if it has many.
void add_use(const Lock&, const Selection& used, const FencePtr& fence,
             std::vector<ModelPtr>& crowded) {
  used.model->uses.push_back({fence, used.layers});
  if (used.model->uses.size() > kManyUses) crowded.push_back(used.model);
}

// If the driver cannot tell, an eviction finds out.
bool passed(const Fence& fence) noexcept {
  try {
    return fence.complete();
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

// Requests the layers that an admitted lease is missing.
void Runtime::serve(const Lock& lock, const LeasePtr& lease) {
  if (lease->entry) lease->entry->finish(state_, lock);
  const bool missing =
      std::any_of(lease->wants.begin(), lease->wants.end(), [](const auto& wanted) {
        bool found = false;
        if (wanted.model->missing)
          wanted.for_each([&](const Layer& l) { found |= l.residency != Residency::resident; });
        return found;
      });
  if (!missing) return;
  lease->ticket = std::make_shared<Ticket>(lease_on(lease->wants), kForeground, lease->wants);
  loader_.request(lock, lease->ticket);
}

LeasePtr Runtime::begin_lease(std::vector<Selection> wants, std::uint64_t owner) {
  for (const Selection& wanted : wants)
    if (!wanted.model->reserved.load(std::memory_order_acquire)) reservation(wanted.model);
  auto lease = std::make_shared<Lease>();
  lease->wants = std::move(wants);
  lease->owner = owner;
  const Lock lock = lock_alive();
  for (const Selection& wanted : lease->wants) check(lock, wanted);
  bool admitted = lease_queue_.try_admit(lock, lease);
  if (!admitted) {
    recall_guards(lock, nullptr);
    admitted = lease_queue_.try_admit(lock, lease);
  }
  if (admitted) {
    serve(lock, lease);
  } else {
    lease_queue_.add_waiter(lock, lease);
    lease->entry =
        std::make_shared<Ticket>(lease_on(lease->wants), kForeground, std::vector<Selection>());
  }
  return lease;
}

LeasePtr Runtime::share_lease(const LeasePtr& lease, std::uint64_t owner) {
  auto shared = std::make_shared<Lease>();
  shared->wants = lease->wants;
  shared->owner = owner;
  const Lock lock = lock_alive();
  if (!lease->admitted) throw Error(ErrorKind::stale_view, "the lease to share is not held");
  lease_queue_.admit(lock, shared);
  serve(lock, shared);
  return shared;
}

void Runtime::await_lease(const LeasePtr& lease, Deadline deadline, const Poll& poll, bool all) {
  try {
    if (lease->entry) await_entry(lease, deadline, poll);
    if (!all) {
      const Lock lock = state_.lock();
      lease->used_early = true;
    }
    if (all && lease->ticket) wait(lease->ticket, deadline, poll);
  } catch (...) {
    end_lease(lease);
    throw;
  }
}

// Waits until the lease is admitted. The message of a timeout says how much the lease needs and
// which models and leases are in its way.
void Runtime::await_entry(const LeasePtr& lease, Deadline deadline, const Poll& poll) {
  enter();
  Lock lock = state_.lock();
  if (wait_until(lock, deadline, poll, [&] { return lease->entry->done; })) {
    if (lease->entry->error) std::rethrow_exception(lease->entry->error);
    return;
  }
  std::uint64_t needed = 0;
  for (const Selection& wanted : lease->wants)
    wanted.for_each([&](const Layer& layer) { needed += layer.granules_needed; });
  const std::uint64_t unleased = arena_.capacity() - state_.held_granules;
  const std::uint64_t free =
      std::min<std::uint64_t>(arena_.free_count() + arena_.trimmed_count(), unleased);
  const Error room =
      no_room(ErrorKind::timeout, lease_on(lease->wants) + " did not begin in time: it",
              needed * arena_.granule_bytes(), arena_.budget(), state_.holders(lock));
  std::string said = room.what();
  said += "; " + format_bytes(free * arena_.granule_bytes()) + " are free and " +
          format_bytes((unleased - free) * arena_.granule_bytes()) + " can be evicted";
  if (const std::size_t ahead = lease_queue_.ahead_of(lock, lease))
    said += "; leases that wait before it: " + std::to_string(ahead);
  throw Error(ErrorKind::timeout, said);
}

bool Runtime::ready(const LeasePtr& lease, bool all) {
  enter();
  const Lock lock = state_.lock();
  return awaited(lock, *lease, all) == nullptr;
}

bool Runtime::notify(const LeasePtr& lease, bool all, const std::shared_ptr<Waker>& waker,
                     std::uint64_t token) {
  enter();
  const Lock lock = state_.lock();
  Ticket* ticket = awaited(lock, *lease, all);
  return ticket && ticket->notify(lock, waker, token);
}

// Returns the ticket that the lease waits for now; null if it waits for no ticket.
Ticket* Runtime::awaited(const Lock&, const Lease& lease, bool all) {
  if (lease.entry && (!lease.entry->done || lease.entry->error))
    return lease.entry->done ? nullptr : lease.entry.get();
  return all && lease.ticket && !lease.ticket->done ? lease.ticket.get() : nullptr;
}

bool Runtime::await_layer(const LeasePtr& lease, const ModelPtr& model, std::uint32_t index,
                          const std::shared_ptr<Stream>& stream, Deadline deadline,
                          const Poll& poll) {
  const Layer& layer = layer_of(*model, index);
  const auto where = [&] { return "layer " + std::to_string(index) + " of '" + model->name + "'"; };
  std::optional<CopyEngine::Events> copies;
  const bool pass = lease && lease->pass;
  // A pass may be captured while its layers are resident: then the stream waits for nothing.
  if (stream && !pass) stream->refuse_capture();
  Lock lock = lock_alive();
  if (lease && !lease->wants_layer(layer)) {
    if (!pass) throw Error(ErrorKind::invalid_argument, where() + " is not in this lease");
    if (!layer.leased()) throw Error(ErrorKind::stale_view, where() + " is not leased");
    lease_queue_.extend(lock, *lease, layer);
  }
  const auto held = [&] {
    if (pass) return layer.leased() || layer.residency == Residency::resident;
    return lease ? lease->admitted : layer.leased();
  };
  const auto over = [&] {
    if (!held() || !layer.load || layer.residency == Residency::resident) return true;
    if (stream && loader_.sent(lock, layer)) copies = loader_.copies(lock, layer);
    return copies.has_value();
  };
  if (!wait_until(lock, deadline, poll, over))
    throw Error(ErrorKind::timeout, where() + " did not arrive in time");
  if (!held())
    throw Error(ErrorKind::stale_view, where() + (pass    ? ": its lease ended before it arrived"
                                                  : lease ? ": the lease is not held"
                                                          : " is not leased"));
  if (!copies && layer.residency != Residency::resident) {
    const Lease* failed = lease && lease->ticket && lease->ticket->error
                              ? lease.get()
                              : lease_queue_.failed(lock, layer);
    if (failed) std::rethrow_exception(failed->ticket->error);
    throw Error(ErrorKind::stale_view, where() + " is not being loaded");
  }
  const bool resident = !copies;
  if (attachment_) lease_queue_.use_early(lock, layer);
  if (copies) {
    if (pass) {  // the stream will use the layer even if its lease ends, so the load must go on
      LayerSet one;
      one.insert(index);
      lease->arriving.push_back(std::make_shared<Ticket>(
          "pass", kForeground, std::vector{Selection(model, std::move(one))}));
      loader_.request(lock, lease->arriving.back());
    }
    lock.unlock();
    if (pass) stream->refuse_capture();
    for (const auto& event : *copies) stream->wait_for(*event);
    copies.reset();
    lock.lock();
  }
  if (lease && !pass) lease->ordered[model.get()].insert(index);
  return resident;
}

Runtime::Pass Runtime::begin_pass(const ModelPtr& model) {
  enter();
  const Lock lock = state_.lock();
  const LeasePtr lease = lease_queue_.begin_pass(lock, model, this_thread());
  if (!lease) return {};
  return {lease, lease->wants.front().whole && model->missing == 0, model->lease_epoch};
}

bool Runtime::arrived(const LeasePtr& lease, const ModelPtr& model, std::uint32_t index) {
  enter();
  const Layer& layer = layer_of(*model, index);
  const Lock lock = state_.lock();
  if (!lease->admitted || !lease->wants_layer(layer)) return false;
  const auto ordered = lease->ordered.find(model.get());
  return layer.residency == Residency::resident ||
         (ordered != lease->ordered.end() && ordered->second.contains(index));
}

void Runtime::record(const LeasePtr& lease, const std::shared_ptr<Stream>& stream) {
  enter();
  const auto fence = std::make_shared<const Fence>(stream);
  std::vector<ModelPtr> crowded;
  {
    const Lock lock = lock_alive();
    if (!lease->admitted) throw Error(ErrorKind::stale_view, "the lease is not held");
    for (const Selection& wanted : lease->wants) add_use(lock, wanted, fence, crowded);
  }
  for (const ModelPtr& model : crowded) forget_past_uses(*model);
  fence->require_recorded();
}

void Runtime::record(const ModelPtr& model, const std::shared_ptr<Stream>& stream) {
  enter();
  const auto fence = std::make_shared<const Fence>(stream);
  std::vector<ModelPtr> crowded;
  {
    const Lock lock = lock_alive();
    LayerSet leased;
    for (const Layer& layer : model->layers)
      if (layer.held()) leased.insert(layer.index);
    if (leased.empty()) throw Error(ErrorKind::stale_view, "'" + model->name + "' is not leased");
    add_use(lock, Selection(model, std::move(leased)), fence, crowded);
  }
  for (const ModelPtr& each : crowded) forget_past_uses(*each);
  fence->require_recorded();
}

// Removes the uses whose streams have passed them, which keeps the list about as long as the number
// of pending uses. The driver is asked without the lock, and dropping the last reference to a
// stream, which may block, also happens without it.
void Runtime::forget_past_uses(Model& model) {
  std::vector<FencePtr> past;
  {
    const Lock lock = state_.lock();
    for (const Use& use : model.uses) past.push_back(use.fence);
  }
  std::erase_if(past, [](const FencePtr& fence) { return !passed(*fence); });
  const Lock lock = state_.lock();
  std::erase_if(model.uses, [&](const Use& use) {
    return std::find(past.begin(), past.end(), use.fence) != past.end();
  });
}

void Runtime::end_lease(const LeasePtr& lease) {
  if (!device_->usable()) return;
  const Lock lock = state_.lock();
  end_lease(lock, lease);
}

void Runtime::end_lease(const Lock& lock, const LeasePtr& lease) {
  if (lease->depth > 1) {
    --lease->depth;
    return;
  }
  const auto drop = [&](const TicketPtr& ticket) {
    if (ticket && !ticket->done) loader_.drop(lock, ticket, cancelled("the lease was ended"));
  };
  drop(lease->entry);
  drop(lease->ticket);
  for (const TicketPtr& ticket : lease->arriving) drop(ticket);
  lease_queue_.remove(lock, lease);
  while (const LeasePtr next = lease_queue_.admit_next(lock)) serve(lock, next);
}

std::pair<bool, std::uint64_t> Runtime::leased(const ModelPtr& model) {
  enter();
  const Lock lock = state_.lock();
  const bool all = model->whole_holds > model->whole_passes ||
                   (model->leases && model->layers_leased == model->layers.size());
  return {all && model->missing == 0, model->leases ? model->lease_epoch : 0};
}

}  // namespace warmserve
