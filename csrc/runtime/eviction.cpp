// The runtime's operations that evict or give memory back: evict(), unregister(), trim() and
// close(), and their waits for leases, passes and streams.
#include <algorithm>
#include <utility>

#include "runtime/runtime.h"

namespace warmserve {
namespace {

// Counts a thread that waits for leases to end, for its scope. Constructed and destroyed under the
// runtime's lock.
class Wanted {
 public:
  explicit Wanted(unsigned& count) : count_(count) { ++count_; }
  ~Wanted() { --count_; }
  Wanted(const Wanted&) = delete;

 private:
  unsigned& count_;
};

// Returns who still used the model when the timeout ended, for messages.
std::string why_late(const Model& model) {
  return (model.leases ? "'" + model.name + "' was still leased"
                       : "a pass still computed with '" + model.name + "'") +
         std::string(" at the end of the timeout");
}

// Returns whether a stream has still to pass one of the fences. A lost device no longer uses
// memory. Drops the lock while it asks the driver, and while it drops the fences: dropping the last
// reference to a stream may block.
bool any_pending(Lock& lock, std::vector<FencePtr> fences) {
  lock.unlock();
  bool pending = false;
  std::exception_ptr failure;
  try {
    pending = !std::all_of(fences.begin(), fences.end(),
                           [](const FencePtr& fence) { return fence->complete(); });
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::device_lost) failure = std::current_exception();
  }
  fences.clear();
  lock.lock();
  if (failure) std::rethrow_exception(failure);
  return pending;
}

}  // namespace

// Waits until no lease and no pass uses the layers; throws busy for users that `wait_for` does not
// cover. A pass counts like a stream, because it continues after its lease.
void Runtime::await_users(Lock& lock, const Selection& selection, Deadline deadline,
                          const Poll& poll, WaitFor wait_for, const std::function<bool()>& leased,
                          const std::function<bool()>& in_use) {
  const Model& model = *selection.model;
  recall_guards(lock, &selection);
  const auto refused = [&] {
    return wait_for == WaitFor::none || (wait_for == WaitFor::streams && leased());
  };
  while (in_use()) {
    if (refused()) throw Error(ErrorKind::busy, why_busy(model));
    if (lease_queue_.in_pass(lock, selection, this_thread()))
      throw Error(ErrorKind::busy, "this thread cannot evict '" + model.name +
                                       "': it computes with the model and would wait for itself");
    const Wanted release(state_.release_wanted);
    if (!wait_until(lock, deadline, poll, [&] { return !in_use() || refused(); }))
      throw Error(ErrorKind::timeout, why_late(model));
  }
}

// Removes a model from the state and returns its reservation and uses. The caller destroys them
// without the lock, because dropping the last reference to a stream waits for the stream's work.
Runtime::Detached Runtime::detach(const Lock& lock, Model& model) {
  model.registered = false;
  host_cache_.drop(lock, model);
  state_.models.erase(model.name);
  return {std::move(model.reservation), std::exchange(model.uses, {})};
}

void Runtime::unregister(const ModelPtr& model, Deadline deadline, const Poll& poll,
                         WaitFor wait_for) {
  Detached detached;
  Lock lock = lock_alive();
  require_registered(lock, *model);
  do {
    await_users(
        lock, model, deadline, poll, wait_for, [&] { return model->leases > 0; },
        [&] { return model->leases + model->passes > 0; });
    evict_locked(lock, model, deadline, poll, wait_for);
    require_registered(lock, *model);  // another thread may have unregistered it meanwhile
  } while (model->leases + model->passes);
  const auto why = cancelled("'" + model->name + "' was unregistered");
  loader_.drop_layers(lock, model, why);
  loader_.drop_host_layers(lock, model, why);
  for (const LeasePtr& lease : lease_queue_.cancel_waiters(lock, model))
    lease->entry->finish(state_, lock, why);
  while (const LeasePtr next = lease_queue_.admit_next(lock)) serve(lock, next);
  detached = detach(lock, *model);
}

void Runtime::evict(const Selection& selection, Deadline deadline, const Poll& poll,
                    WaitFor wait_for) {
  Lock lock = lock_alive();
  check(lock, selection);
  evict_locked(lock, selection, deadline, poll, wait_for);
  if (!attachment_) return;
  lock.unlock();
  attachment_->evict(*selection.model, selection.layers, static_cast<std::uint32_t>(wait_for),
                     deadline, poll);
}

void Runtime::evict_locked(Lock& lock, const Selection& selection, Deadline deadline,
                           const Poll& poll, WaitFor wait_for) {
  const std::string name = "'" + selection.model->name + "'";
  const auto any = [&](auto&& is) {
    bool found = false;
    selection.for_each([&](const Layer& layer) { found = found || is(layer); });
    return found;
  };
  const auto leased = [&] { return any([](const Layer& l) { return l.leased(); }); };
  const auto held = [&] { return any([](const Layer& l) { return l.held(); }); };
  const auto gone = [&] {
    return !any([](const Layer& l) { return l.residency != Residency::absent; });
  };
  const auto fences = [&] {
    std::vector<FencePtr> found;
    for (const Use& use : selection.model->uses)
      if (use.layers.intersects(selection.layers)) found.push_back(use.fence);
    return found;
  };
  const auto settled = [&] {  // no thread works on any of the layers
    return !any([](const Layer& l) { return l.busy || l.residency == Residency::filling; });
  };
  do {
    await_users(lock, selection, deadline, poll, wait_for, leased, held);
    const std::uint64_t epoch = selection.model->lease_epoch;
    if (wait_for == WaitFor::none && any_pending(lock, fences()))
      throw Error(ErrorKind::busy, "a stream still uses " + name);
    if (selection.model->lease_epoch != epoch) continue;  // a lease began without the lock
    loader_.drop_layers(lock, selection, cancelled(name + " was evicted"));
    std::vector<Layer*> layers;
    selection.for_each([&](Layer& layer) {
      if (!layer.busy && (layer.residency == Residency::resident || layer.unmap_failed))
        layers.push_back(&layer);
    });
    if (!layers.empty()) {
      std::vector<GranuleId> freed;
      state_.claim(lock, layers);
      try {
        drain_and_unmap(state_, lock, layers, deadline, poll, freed);
      } catch (const HeldByClient&) {  // await_users() sees the client's lease
        if (wait_for != WaitFor::leases_and_streams) {
          arena_.give(freed);
          throw;
        }
      } catch (...) {
        arena_.give(freed);
        throw;
      }
      arena_.give(freed);
    }
    if (!wait_until(lock, deadline, poll, settled))
      throw Error(ErrorKind::timeout, name + " was not evicted in time");
  } while (!gone());
}

std::vector<FencePtr> Runtime::all_fences(const Lock&) const {
  std::vector<FencePtr> fences;
  for (const auto& [name, model] : state_.models)
    for (const Use& use : model->uses) fences.push_back(use.fence);
  return fences;
}

// Waits for the streams that still use any model. Returns false if the deadline passes first.
// Releases the lock while it waits.
bool Runtime::await_streams(Lock& lock, Deadline deadline, const Poll& poll) {
  std::vector<FencePtr> fences = all_fences(lock);
  lock.unlock();
  bool ended = true;
  std::exception_ptr failure;
  try {
    for (const auto& fence : fences) fence->wait(deadline, poll);
  } catch (const Error& error) {
    ended = error.kind() == ErrorKind::device_lost;  // a lost device no longer uses memory
    if (!ended && error.kind() != ErrorKind::timeout) failure = std::current_exception();
  } catch (...) {  // of poll
    failure = std::current_exception();
  }
  fences.clear();  // without the lock: dropping the last reference to a stream may block
  lock.lock();
  if (failure) std::rethrow_exception(failure);
  return ended;
}

std::uint64_t Runtime::trim() {
  refuse_client("trim()");
  Lock lock = lock_alive();
  if (state_.clients)
    throw Error(
        ErrorKind::invalid_argument,
        "trim() is not available while a broker has served the arena: clients may still map "
        "its granules");
  if (arena_.id())
    throw Error(ErrorKind::invalid_argument,
                "trim() is not available for memory that was given to the driver");
  return trim_locked(lock);
}

std::uint64_t Runtime::trim_locked(Lock& lock) {
  const std::vector<GranuleId> ids = arena_.take(arena_.free_count());
  state_.granules_in_hand += ids.size();
  lock.unlock();
  const std::size_t destroyed = arena_.destroy(ids);
  lock.lock();
  state_.granules_in_hand -= ids.size();
  arena_.return_trimmed(std::span(ids).first(destroyed));
  arena_.give(std::span(ids).subspan(destroyed));
  state_.wake();
  if (destroyed < ids.size())
    throw Error(ErrorKind::general, "the driver released " + std::to_string(destroyed) + " of " +
                                        std::to_string(ids.size()) + " granules");
  return destroyed * arena_.granule_bytes();
}

void Runtime::stop() {
  if (!device_->usable()) return;
  loader_.stop();
  host_slabs_.stop();
  if (attachment_) attachment_->stop();
}

void Runtime::close(const Poll& poll, Deadline deadline, WaitFor wait_for) {
  std::vector<Detached> detached;
  std::shared_ptr<Clients> clients;  // destroyed without the lock
  enter();
  Lock lock = state_.lock();
  if ((clients = state_.clients)) {
    lock.unlock();
    clients->end_holds_if_stopped();
    lock.lock();
  }
  recall_guards(lock, nullptr);
  const auto idle = [&] { return !closing_ && !lease_queue_.active(); };
  do {
    if (!wait_until(lock, deadline, poll, [&] { return !closing_; }))
      throw Error(ErrorKind::timeout, "close: another thread was still closing the runtime");
    for (const auto& [name, model] : state_.models) {
      if (model->leases + model->passes && wait_for != WaitFor::leases_and_streams)
        throw Error(ErrorKind::busy, "close: " + why_busy(*model));
      if (lease_queue_.in_pass(lock, model, this_thread()))
        throw Error(ErrorKind::busy,
                    "close: this thread computes with '" + name + "' and would wait for itself");
    }
    const Wanted release(state_.release_wanted);
    if (!wait_until(lock, deadline, poll, idle)) {
      for (const auto& [name, model] : state_.models)
        if (model->leases + model->passes)
          throw Error(ErrorKind::timeout, "close: " + why_late(*model));
      throw Error(ErrorKind::timeout, "close: another thread was still closing the runtime");
    }
    if (wait_for == WaitFor::none && any_pending(lock, all_fences(lock)))
      throw Error(ErrorKind::busy, "close: a stream still uses a model");
    if (deadline != kNever && !await_streams(lock, deadline, poll))
      throw Error(ErrorKind::timeout,
                  "close: a stream still used a model at the end of the timeout");
  } while (!idle());
  closed_ = closing_ = true;
  struct Closing {
    ~Closing() {
      if (!lock.owns_lock()) lock.lock();
      closing = false;
      state.wake();
    }
    Lock& lock;
    bool& closing;
    SharedState& state;
  } end{lock, closing_, state_};
  const auto why = cancelled("the runtime was closed");
  for (const auto& [name, model] : state_.models) {
    loader_.drop_layers(lock, model, why);
    loader_.drop_host_layers(lock, model, why);
  }
  loader_.drop_swaps(lock, why);
  if (attachment_) attachment_->refuse_loads(lock, why);
  lock.unlock();
  loader_.stop();
  host_slabs_.stop();
  lock.lock();
  // No granule is filled again, and the driver keeps memory that other processes map. So clients
  // may go on reading theirs.
  clients = std::exchange(state_.clients, nullptr);
  while (!state_.models.empty()) {
    const ModelPtr model = state_.models.begin()->second;
    evict_locked(lock, model, kNever, poll, WaitFor::streams);
    // False if another thread has unregistered the model meanwhile.
    if (model->registered) detached.push_back(detach(lock, *model));
  }
  wait_until(lock, kNever, poll, [&] { return state_.granules_in_hand == 0; });
  if (attachment_) {
    lock.unlock();
    attachment_->leave();
    lock.lock();
  }
  loader_.erase_host_loads(lock);
  if (arena_.free_count() && !attachment_ && !arena_.id()) trim_locked(lock);
  lock.unlock();
  detached.clear();
  readers_.clear();
  loader_.release();
  staging_.release();
  host_slabs_.release();
  arena_.release();
  if (!device_->retry_releases())
    throw Error(ErrorKind::general,
                "close: the driver refused to release some resources; close() can be retried");
}

}  // namespace warmserve
