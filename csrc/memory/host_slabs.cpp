#include "memory/host_slabs.h"

#include <algorithm>
#include <system_error>

#include "base/error.h"
#include "base/os_failure.h"
#include "driver/host_limits.h"

namespace warmserve {
namespace {

// While CUDA registers a region, the kernel holds the lock of the process's mappings.
constexpr std::uint64_t kSlabBytes = 256 * kMiB;

std::uint64_t checked(std::uint64_t bytes) {
  if (!bytes) return 0;
  if (bytes < HostSlabs::kUnitBytes)
    throw Error(ErrorKind::invalid_argument, "a host cache needs at least " +
                                                 format_bytes(HostSlabs::kUnitBytes) + ", got " +
                                                 format_bytes(bytes));
  const std::uint64_t available = available_memory();
  if (bytes > available)
    throw Error(ErrorKind::invalid_argument,
                "a host cache of " + format_bytes(bytes) + " exceeds the " +
                    format_bytes(available) +
                    " that the machine and its memory control groups have left");
  return bytes / HostSlabs::kUnitBytes * HostSlabs::kUnitBytes;
}

}  // namespace

HostSlabs::HostSlabs(DevicePtr device, std::uint64_t bytes, bool thread)
    : device_(std::move(device)), budget_(checked(bytes)) {
  if (!budget_) return;
  if (!thread) {
    pin_all();
    return;
  }
  try {
    thread_ = std::thread(&HostSlabs::pin_all, this);
  } catch (const std::system_error& error) {
    throw Error(ErrorKind::general, os_failure("starting a thread that pins the host cache",
                                               error.code().value(), OsLimit::threads));
  }
}

void HostSlabs::pin_all() {
  while (pin_next()) {
  }
}

// Pins one more slab. Returns false when the budget is reached, when the pool is stopped, or after
// a failure. Called by one thread only; blocks without the lock.
bool HostSlabs::pin_next() {
  std::uint64_t bytes = 0;
  {
    const std::lock_guard lock(mutex_);
    if (stopping_ || pinned_ == budget_) return false;
    bytes = std::min(kSlabBytes, budget_ - pinned_);
  }
  std::string error;
  std::unique_ptr<PinnedRegion> slab;
  if (const std::uint64_t available = available_memory(); available < bytes + kKeptForProcess) {
    error = "only " + format_bytes(available) + " of the machine's memory are left";
  } else {
    try {
      slab = std::make_unique<PinnedRegion>(device_, bytes);
    } catch (const Error& caught) {
      error = caught.what();
    }
  }
  const std::lock_guard lock(mutex_);
  if (!slab) {
    error_ = "the host cache stays at " + format_bytes(pinned_) + " of " + format_bytes(budget_) +
             ": " + error;
    return false;
  }
  const auto number = static_cast<std::uint32_t>(slabs_.size());
  for (std::uint64_t at = 0; at < bytes; at += kUnitBytes) free_.emplace(slab->data() + at, number);
  slabs_.push_back(std::move(slab));
  pinned_ += bytes;
  return true;
}

HostSlabs::State HostSlabs::state() const {
  const std::lock_guard lock(mutex_);
  return {budget_, pinned_, pinned_ - free_.size() * kUnitBytes, error_};
}

bool HostSlabs::growing() const {
  const std::lock_guard lock(mutex_);
  return pinned_ < budget_ && error_.empty() && !stopping_;
}

std::size_t HostSlabs::free_units() const {
  const std::lock_guard lock(mutex_);
  return free_.size();
}

std::optional<HostSlabs::Units> HostSlabs::take(std::size_t count) {
  const std::lock_guard lock(mutex_);
  if (count > free_.size()) return std::nullopt;
  Units units(this);
  units.blocks_.reserve(count);
  units.slabs_.reserve(count);
  units.nodes_.reserve(count);
  while (units.nodes_.size() < count) {
    units.blocks_.push_back(free_.begin()->first);
    units.slabs_.push_back(free_.begin()->second);
    units.nodes_.push_back(free_.extract(free_.begin()));
  }
  return units;
}

void HostSlabs::give_back(std::vector<Free::node_type>& nodes) noexcept {
  const std::lock_guard lock(mutex_);
  for (auto& node : nodes) free_.insert(std::move(node));
}

void HostSlabs::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void HostSlabs::release() {
  std::vector<std::unique_ptr<PinnedRegion>> slabs;  // unpinned without the lock
  const std::lock_guard lock(mutex_);
  slabs.swap(slabs_);
  free_.clear();
  pinned_ = 0;
}

}  // namespace warmserve
