#include "runtime/guard.h"

#include <algorithm>
#include <utility>

#include "runtime/runtime.h"

namespace warmserve {

Guard::Guard(Runtime& runtime, Selection wanted) : runtime_(runtime), wanted_(std::move(wanted)) {
  const Lock lock = runtime_.lock_alive();
  runtime_.check(lock, wanted_);
  runtime_.guards_.push_back(this);
}

Guard::~Guard() {
  if (!runtime_.device_->usable()) return;
  const Lock lock = runtime_.state_.lock();
  std::erase(runtime_.guards_, this);
  if (lease_) runtime_.end_lease(lock, lease_);
}

void Guard::throw_not_held() { throw Error(ErrorKind::stale_view, "the guard is not held"); }

bool Guard::try_acquire() {
  runtime_.enter();
  holds_.fetch_add(1);
  if (kept_.load()) return true;
  // A recall that has counted this attempt as a hold left the end of the lease to it.
  holds_.fetch_sub(1);
  end_if_unused();
  return false;
}

void Guard::acquire_slowly(Deadline deadline, const Poll& poll) {
  const LeasePtr lease = runtime_.begin_lease({wanted_}, this_thread());
  runtime_.await_lease(lease, deadline, poll);
  // The new lease holds the layers until this hold is counted.
  const Lock lock = runtime_.state_.lock();
  holds_.fetch_add(1);
  if (lease_) {  // of other threads, whose holds have not ended since it was recalled
    runtime_.end_lease(lock, lease);
    return;
  }
  lease_ = lease;
  // While a lease waits, holds that follow each other without a pause would keep it waiting.
  kept_.store(runtime_.attachment_ && !runtime_.lease_queue_.any_waits());
}

void Guard::end_if_unused() noexcept {
  const Lock lock = runtime_.state_.lock();
  if (const LeasePtr lease = take_unused(lock)) runtime_.end_lease(lock, lease);
}

LeasePtr Guard::take_unused(const Lock&) {
  return !kept_.load() && holds_.load() == 0 ? std::exchange(lease_, nullptr) : nullptr;
}

LeasePtr Guard::recall(const Lock& lock) {
  kept_.store(false);
  return take_unused(lock);
}

void Runtime::recall_guards(const Lock& lock, const Selection* selection) {
  for (Guard* guard : guards_) {
    const Selection& wanted = guard->wanted();
    if (selection &&
        (wanted.model != selection->model || !wanted.layers.intersects(selection->layers)))
      continue;
    if (const LeasePtr lease = guard->recall(lock)) end_lease(lock, lease);
  }
}

}  // namespace warmserve
