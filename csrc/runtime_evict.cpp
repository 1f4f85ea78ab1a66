// The runtime's leave-taking: what evicts layers, forgets a model or closes, and waits for leases.
#include <algorithm>
#include <utility>

#include "runtime.h"

namespace warmserve {
namespace {

// Counts one that waits for leases to end, for the time of its scope. Under the runtime's lock.
class Wanted {
 public:
  explicit Wanted(unsigned& count) : count_(count) { ++count_; }
  ~Wanted() { --count_; }
  Wanted(const Wanted&) = delete;

 private:
  unsigned& count_;
};

}  // namespace

// Waits until no lease holds what unheld() looks at, or throws busy if `patience` is not for
// leases.
void Runtime::await_leases(Lock& lock, const std::string& who, Deadline deadline, const Poll& poll,
                           Patience patience, const std::function<bool()>& unheld) {
  if (unheld()) return;
  if (patience != Patience::leases_and_streams) throw Error(ErrorKind::busy, who + " is leased");
  const Wanted release(books_.release_wanted);
  if (!wait_until(lock, deadline, poll, unheld))
    throw Error(ErrorKind::timeout, who + " was still leased at the end of the timeout");
}

// Takes a model off the books. What it had, which may be the last of a stream that has work left,
// is the caller's to free without the lock.
Runtime::Remains Runtime::take_off(const Lock&, Model& model) {
  model.registered = false;
  books_.models.erase(model.name);
  return {std::move(model.reservation), std::exchange(model.uses, {})};
}

void Runtime::unregister(const ModelPtr& model, Deadline deadline, const Poll& poll,
                         Patience patience) {
  Remains remains;
  Lock lock = open();
  require_registered(lock, *model);
  do {
    await_leases(lock, "'" + model->name + "'", deadline, poll, patience,
                 [&] { return !model->leases; });
    evict_locked(lock, model, deadline, poll, patience);
    require_registered(lock, *model);  // another thread may have been faster
  } while (model->leases);
  const auto why = cancelled("'" + model->name + "' was unregistered");
  transfer_.drop_layers(lock, model, why);
  for (const HoldPtr& hold : desk_.turn_away(lock, model)) hold->entry->finish(books_, lock, why);
  while (const HoldPtr next = desk_.admit_next(lock)) serve(lock, next);
  remains = take_off(lock, *model);
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
    await_leases(lock, name, deadline, poll, patience, free);
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

bool Runtime::streams_in_use(const Lock&) const {
  try {
    for (const auto& [name, model] : books_.models)
      for (const Use& use : model->uses)
        if (!use.fence->complete()) return true;
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::device_lost) throw;  // which uses nothing any more
  }
  return false;
}

// Waits for the streams that still use any model; false if they need longer. Gives the lock away.
bool Runtime::await_streams(Lock& lock, Deadline deadline, const Poll& poll) {
  std::vector<std::shared_ptr<const Fence>> fences;
  for (const auto& [name, model] : books_.models)
    for (const Use& use : model->uses) fences.push_back(use.fence);
  lock.unlock();
  bool ended = true;
  try {
    for (const auto& fence : fences) fence->wait(deadline, poll);
  } catch (const Error& error) {
    ended = error.kind() == ErrorKind::device_lost;  // which uses nothing any more
    if (!ended && error.kind() != ErrorKind::timeout) throw;
  }
  fences.clear();  // without the lock: one may be the last of a stream that has work left
  lock.lock();
  return ended;
}

void Runtime::close(const Poll& poll, Deadline deadline, Patience patience) {
  std::vector<Remains> remains;
  enter();
  Lock lock(books_.mutex);
  const auto idle = [&] { return !closing_ && !desk_.active(); };
  do {
    if (!wait_until(lock, deadline, poll, [&] { return !closing_; }))
      throw Error(ErrorKind::timeout, "close: another thread was still closing the runtime");
    std::string who = "close: a model";
    for (const auto& [name, model] : books_.models)
      if (model->leases) who = "close: '" + name + "'";
    await_leases(lock, who, deadline, poll, patience, idle);
    if (patience == Patience::none && streams_in_use(lock))
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
