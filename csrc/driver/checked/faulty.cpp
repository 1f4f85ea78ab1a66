#include "driver/checked/faulty.h"

#include <algorithm>
#include <thread>

namespace warmserve {
namespace {

// Whether this driver failed the last call on this thread. If so, the device's own detail is stale.
thread_local bool failed_here = false;

}  // namespace

std::string FaultyDriver::detail() const { return failed_here ? "" : Interposer::detail(); }

void FaultyDriver::arm(std::vector<Range> ranges, std::optional<Primitive> only, Status status) {
  const std::lock_guard lock(mutex_);
  ranges_ = std::move(ranges);
  only_ = only;
  status_ = status;
  calls_ = injected_ = 0;
  last_.reset();
}

std::uint64_t FaultyDriver::calls() const {
  const std::lock_guard lock(mutex_);
  return calls_;
}
std::uint64_t FaultyDriver::injected() const {
  const std::lock_guard lock(mutex_);
  return injected_;
}
std::string FaultyDriver::last() const {
  const std::lock_guard lock(mutex_);
  return last_ ? to_string(*last_) : "";
}

void FaultyDriver::delay(Primitive primitive, std::chrono::microseconds by) {
  const std::lock_guard lock(mutex_);
  delays_[static_cast<int>(primitive)] = by;
}
void FaultyDriver::cap_memory(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  cap_ = bytes;
}

Status FaultyDriver::before(Primitive primitive) {
  std::unique_lock lock(mutex_);
  failed_here = false;
  const auto delay = delays_[static_cast<int>(primitive)];
  if (!only_ || *only_ == primitive) {
    const std::uint64_t call = ++calls_;
    if (std::any_of(ranges_.begin(), ranges_.end(),
                    [&](const Range& r) { return r.first <= call && call <= r.last; })) {
      ++injected_;
      last_ = primitive;
      failed_here = true;
      return status_;
    }
  }
  lock.unlock();
  if (delay.count()) std::this_thread::sleep_for(delay);
  return Status::ok;
}

Status FaultyDriver::granule_create(std::uint64_t bytes, Handle* out) {
  {
    const std::lock_guard lock(mutex_);
    if (bytes > cap_ || created_ > cap_ - bytes) {
      failed_here = true;
      return Status::out_of_memory;
    }
    granule_bytes_ = bytes;
    created_ += bytes;
  }
  const Status status = Interposer::granule_create(bytes, out);
  if (status != Status::ok) {
    const std::lock_guard lock(mutex_);
    created_ -= bytes;
  }
  return status;
}

Status FaultyDriver::granule_release(Handle handle) {
  const Status status = Interposer::granule_release(handle);
  const std::lock_guard lock(mutex_);
  if (status == Status::ok && !imported_.erase(handle)) created_ -= granule_bytes_;
  return status;
}

Status FaultyDriver::granule_import(const SharedGranule& shared, std::uint64_t bytes, Handle* out) {
  const Status status = Interposer::granule_import(shared, bytes, out);
  const std::lock_guard lock(mutex_);
  if (status == Status::ok) imported_.insert(*out);
  return status;
}

}  // namespace warmserve
