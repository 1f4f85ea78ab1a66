#include "memory/arena.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

namespace warmserve {
namespace {

std::uint32_t checked_capacity(const Device& device, const Arena::Options& options) {
  const std::uint64_t granularity = device.facts().granularity;
  if (options.granule_bytes == 0 || options.granule_bytes % granularity)
    throw Error(ErrorKind::invalid_argument, "a granule of " + format_bytes(options.granule_bytes) +
                                                 " is not a positive multiple of the device's " +
                                                 format_bytes(granularity));
  for (const std::uint64_t bytes : {options.bytes, options.granule_bytes, options.headroom_bytes})
    if (bytes > kMostBytes)
      throw Error(ErrorKind::invalid_argument,
                  "sizes must be below 2^63 bytes, got " + std::to_string(bytes));
  const std::uint64_t capacity = options.bytes / options.granule_bytes;
  if (capacity == 0 || capacity > UINT32_MAX)
    throw Error(ErrorKind::invalid_argument,
                "an arena of " + format_bytes(options.bytes) + " holds no whole granule of " +
                    format_bytes(options.granule_bytes) + ", or more than 4294967295");
  return static_cast<std::uint32_t>(capacity);
}

}  // namespace

Arena::Arena(DevicePtr device, const Options& options)
    : device_(std::move(device)),
      granule_bytes_(options.granule_bytes),
      headroom_bytes_(options.headroom_bytes),
      capacity_(checked_capacity(*device_, options)),
      imported_(options.imported) {
  pool_ = trimmed_ = GranulePool(capacity_);
  if (const int record = device_->facts().contents; record >= 0) {
    contents_ = std::make_unique<Contents>(record, capacity_, granule_bytes_);
    filled_ = aside_ = GranulePool(capacity_);
  }
  slots_.resize(capacity_);
  if (imported_) {  // any id can be taken, and gets its granule from import()
    give_all();
    return;
  }
  // Checked before anything is allocated: populating more memory than is available would not fail
  // but start the OOM killer.
  require_memory(budget(), "an arena of " + format_bytes(budget()));
  if (!device_->facts().host_view) window_ = reserve(budget());
  make_all();
  if (options.poison) make_poison();
}

// Does nothing if the device does not report its memory.
void Arena::require_memory(std::uint64_t bytes, const std::string& what) const {
  std::uint64_t available = 0, total = 0;
  device_->memory(&available, &total);
  if (!total || (bytes <= available && headroom_bytes_ <= available - bytes)) return;
  std::string message = what;
  if (headroom_bytes_) message += " beside a headroom of " + format_bytes(headroom_bytes_);
  throw Error(ErrorKind::out_of_device_memory, message + " does not fit on a device with " +
                                                   format_bytes(available) + " free of " +
                                                   format_bytes(total));
}

// Another process may take memory meanwhile, so the error names the bytes requested and free.
void Arena::make_all() {
  for (GranuleId id = 0; id < capacity_; ++id) try {
      make(id);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::out_of_device_memory) throw;
      slots_.clear();
      std::uint64_t available = 0, total = 0;
      device_->memory(&available, &total);
      throw Error(ErrorKind::out_of_device_memory,
                  "an arena of " + format_bytes(budget()) + ": " + error.what() + " after " +
                      format_bytes(id * granule_bytes_) + "; the device has " +
                      format_bytes(available) + " free of " + format_bytes(total) +
                      " after they were released");
    }
  give_all();
}

void Arena::give_all() {
  std::vector<GranuleId> all(capacity_);
  std::iota(all.begin(), all.end(), 0);
  give(all);
}

std::vector<GranuleId> Arena::take(std::uint32_t count) {
  std::vector<GranuleId> taken = pool_.take(std::min(count, pool_.free_count()));
  if (taken.size() == count) return taken;
  const auto more = filled_.take(count - static_cast<std::uint32_t>(taken.size()));
  taken.insert(taken.end(), more.begin(), more.end());
  std::sort(taken.begin(), taken.end());
  return taken;
}

void Arena::give(std::span<const GranuleId> ids) noexcept {
  if (!contents_) return pool_.give(ids);
  for (const GranuleId id : ids)
    (contents_->recorded(id) ? filled_ : pool_).give(std::span(&id, 1));
}

void Arena::forget(std::span<const GranuleId> ids) {
  if (!contents_) return;
  for (const GranuleId id : ids)
    for (const GranuleId other : contents_->erase(id)) {
      if (!filled_.is_free(other)) continue;
      filled_.take(std::span(&other, 1));
      pool_.give(std::span(&other, 1));
    }
}

std::vector<GranuleId> Arena::remembered(const ContentKey& key) const {
  const std::vector<GranuleId>* ids = recorded(key);
  const auto unused = [this](GranuleId id) { return is_filled(id) || is_aside(id); };
  return ids && std::ranges::all_of(*ids, unused) ? *ids : std::vector<GranuleId>();
}

void Arena::take_remembered(std::span<const GranuleId> ids) noexcept {
  for (const GranuleId id : ids) (filled_.is_free(id) ? filled_ : aside_).take(std::span(&id, 1));
}

void Arena::set_aside(std::span<const GranuleId> ids) {
  if (!contents_) return;
  for (const GranuleId id : ids) {
    if (!is_free(id)) continue;
    (filled_.is_free(id) ? filled_ : pool_).take(std::span(&id, 1));
    aside_.give(std::span(&id, 1));
  }
}

void Arena::end_set_aside(std::span<const GranuleId> ids) {
  for (const GranuleId id : ids) {
    if (!is_aside(id)) continue;
    aside_.take(std::span(&id, 1));
    give(std::span(&id, 1));
  }
}

void Arena::import(GranuleId id, const SharedGranule& shared) {
  slots_[id].granule.emplace(device_, shared, granule_bytes_);
}

void Arena::create(GranuleId id) {
  if (headroom_bytes_) require_memory(granule_bytes_, "a granule");
  make(id);
}

void Arena::make(GranuleId id) {
  Slot& slot = slots_[id];
  if (slot.window) {  // an earlier drop_window() failed
    slot.window->unmap();
    slot.window.reset();
  }
  Granule granule(device_, granule_bytes_);
  if (window_) {
    const Handle handle = granule.handle();
    Mapping window(window_, id * granule_bytes_, std::span(&handle, 1), granule_bytes_);
    slot.window.emplace(std::move(window));
    try {
      slot.window->set_access(Access::read_write);
    } catch (...) {
      drop_window(slot);
      throw;
    }
  }
  slot.granule.emplace(std::move(granule));
}

// If the driver refuses, the next make() of this slot tries again.
void Arena::drop_window(Slot& slot) noexcept {
  try {
    if (slot.window) slot.window->unmap();
    slot.window.reset();
  } catch (const Error&) {
  }
}

std::size_t Arena::destroy(std::span<const GranuleId> ids) noexcept {
  for (std::size_t done = 0; done < ids.size(); ++done) {
    Slot& slot = slots_[ids[done]];
    if (!slot.granule) continue;  // its import failed
    // The release comes before the unmap: the memory lives on while the window maps it, so a
    // granule whose release is refused stays intact.
    try {
      slot.granule->release();
    } catch (const Error&) {
      return done;
    }
    slot.granule.reset();
    drop_window(slot);
  }
  return ids.size();
}

void Arena::release() noexcept {
  slots_.clear();  // this also drops windows whose unmap failed before
  slots_.resize(capacity_);
  window_.reset();
  poison_.reset();
}

void Arena::make_poison() {
  poison_.emplace(device_, granule_bytes_);
  if (std::byte* view = poison_->host_view()) {
    std::memset(view, 0xFF, granule_bytes_);
    device_->driver().host_wrote(poison_->handle(), 0, granule_bytes_);
    return;
  }
  const Handle handle = poison_->handle();
  Mapping mapping(reserve(granule_bytes_), 0, std::span(&handle, 1), granule_bytes_);
  mapping.set_access(Access::read_write);
  const std::vector<std::byte> ones(granule_bytes_, std::byte{0xFF});
  Stream stream(device_);
  stream.copy_to_device(mapping.address(), ones.data(), granule_bytes_);
  stream.synchronize();
}

void Arena::check_invariants() const {
  std::uint32_t free = 0;
  for (GranuleId id = 0; id < capacity_; ++id) {
    if (pool_.is_free(id) && contents_ && (contents_->recorded(id) || filled_.is_free(id)))
      throw Error(ErrorKind::general, "free granule " + std::to_string(id) +
                                          " contains a layer, but is handed out first");
    if (is_filled(id) && !contents_->recorded(id))
      throw Error(ErrorKind::general,
                  "granule " + std::to_string(id) + " contains no layer, but is handed out last");
    if (!is_free(id)) continue;
    ++free;
    if (slots_[id].granule.has_value() == imported_ || (window_ && !slots_[id].window))
      throw Error(ErrorKind::general, "free granule " + std::to_string(id) +
                                          " has no memory, or still has another process's");
  }
  if (free != free_count()) throw Error(ErrorKind::general, "the count of free granules is wrong");
  for (GranuleId id = 0; id < capacity_; ++id)
    if (trimmed_.is_free(id) && (slots_[id].granule || is_free(id)))
      throw Error(ErrorKind::general,
                  "trimmed granule " + std::to_string(id) + " exists or is free");
}

}  // namespace warmserve
