#include "driver/host/slots.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "base/os_failure.h"
#include "driver/host_limits.h"
#include "driver/host_memory.h"

namespace warmserve {
namespace {

// The C library's headers may be too old for these.
constexpr int kPopulateWrite = 23, kCollapse = 25;

// A check of the available memory reads several files, so its result is reused for these bytes and
// this time.
constexpr std::uint64_t kBytesPerLook = 32 * kMiB;
constexpr auto kLookLasts = std::chrono::milliseconds(50);

// An extent may exceed the need by a sixteenth of the mapped bytes, at most by this.
constexpr std::uint64_t kLargestStep = kGiB;

}  // namespace

HostSlots::HostSlots(bool huge_pages, std::string root, int given)
    : huge_pages_(huge_pages),
      given_(given >= 0),
      root_(std::move(root)),
      memfd_(given_ ? ::fcntl(given, F_DUPFD_CLOEXEC, 0)
                    : ::memfd_create("warmserve-arena", MFD_CLOEXEC)) {
  if (memfd_ < 0)
    throw Error(ErrorKind::general,
                os_failure(given_ ? "fcntl(F_DUPFD_CLOEXEC) of the arena's memfd"
                                  : "memfd_create for the arena",
                           errno, OsLimit::descriptors));
  if (given_) {
    map_given();
    return;
  }
  // A memfd is born with mode 0777: a process of another user that is given a read-only descriptor
  // could open it again for writing.
  if (::fchmod(memfd_, S_IRUSR | S_IWUSR) != 0) {
    const int error = errno;
    ::close(memfd_);
    throw Error(ErrorKind::general, os_failure("fchmod of the arena's memfd", error));
  }
}

// Maps the whole memfd as one extent, so that slots lie at the same offsets in every process that
// is given it.
void HostSlots::map_given() {
  struct stat status{};
  std::string why;
  const std::lock_guard lock(mutex_);
  if (::fstat(memfd_, &status) != 0)
    why = os_failure("fstat of the arena's memfd", errno);
  else if (map_extent(static_cast<std::uint64_t>(status.st_size), &why) == Status::ok)
    present_ = static_cast<std::uint64_t>(status.st_blocks) * 512;
  if (why.empty()) return;
  ::close(memfd_);
  throw Error(ErrorKind::general, why);
}

HostSlots::~HostSlots() {
  for (const auto& [offset, extent] : extents_) ::munmap(extent.memory, extent.bytes);
  ::close(memfd_);
}

int HostSlots::read_only_descriptor() const {
  const std::string path = "/proc/self/fd/" + std::to_string(memfd_);
  return ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
}

std::uint64_t HostSlots::mappings() const {
  const std::lock_guard lock(mutex_);
  return extents_.size();
}

std::uint64_t HostSlots::unused() const {
  const std::uint64_t available = available_memory(root_);
  return available - std::min(available, kKeptForProcess);
}

std::uint64_t HostSlots::available() const {
  const std::uint64_t free = unused();
  const std::lock_guard lock(mutex_);
  return free + present_;
}

std::byte* HostSlots::view(std::uint64_t offset) const {
  const std::lock_guard lock(mutex_);
  const auto& [begin, extent] = *std::prev(extents_.upper_bound(offset));
  return extent.memory + (offset - begin);
}

Status HostSlots::create(std::uint64_t bytes, std::uint64_t* offset, std::string* why) {
  {
    const std::lock_guard lock(mutex_);
    if (const Status status = find_room(bytes, why); status != Status::ok) return status;
    if (const Status status = take_offset(bytes, offset, why); status != Status::ok) return status;
    populating_ += bytes;
  }
  const bool populated = populate(view(*offset), *offset, bytes);
  const int error = errno;
  const std::lock_guard lock(mutex_);
  populating_ -= bytes;
  if (populated) return Status::ok;
  punch(*offset, bytes);
  free_.emplace(bytes, *offset);
  *why = os_failure("madvise(MADV_POPULATE_WRITE) of " + format_bytes(bytes), error);
  return Status::out_of_memory;
}

bool HostSlots::recycle(std::uint64_t offset, std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  if (!punch(offset, bytes)) return false;
  free_.emplace(bytes, offset);
  return true;
}

// Checks that the memory is available. The lock is held.
Status HostSlots::find_room(std::uint64_t bytes, std::string* why) {
  if (present_ >= bytes) {
    present_ -= bytes;
    return Status::ok;
  }
  if (allowed_ < bytes || Clock::now() >= look_again_) {
    const std::uint64_t all = unused();
    const std::uint64_t left = all - std::min(all, populating_);
    if (left < bytes) {
      *why = format_bytes(bytes) + " are needed, but " + format_bytes(left) +
             " are available in the machine and its control groups, beside " +
             format_bytes(kKeptForProcess) + " that must stay free";
      return Status::out_of_memory;
    }
    allowed_ = std::min(left, std::max(bytes, kBytesPerLook));
    look_again_ = Clock::now() + kLookLasts;
  }
  allowed_ -= bytes;
  return Status::ok;
}

// Finds a part of the memfd that has a view: a recycled one, or a new one. The lock is held.
Status HostSlots::take_offset(std::uint64_t bytes, std::uint64_t* offset, std::string* why) {
  if (const auto reusable = free_.lower_bound({bytes, 0});
      reusable != free_.end() && reusable->first == bytes) {
    *offset = reusable->second;
    free_.erase(reusable);
    return Status::ok;
  }
  if (given_ && mapped_ - end_ < bytes) {
    *why =
        "the given memfd has " + format_bytes(mapped_) + ", and slots take " + format_bytes(end_);
    return Status::out_of_memory;
  }
  if (mapped_ - end_ < bytes) {  // a slot lies in one extent
    end_ = mapped_;
    if (const Status status = map_extent(bytes, why); status != Status::ok) return status;
  }
  // Beyond the limit ftruncate would raise SIGXFSZ, so the limit is checked here.
  const bool fits = given_ || end_ + bytes <= file_size_limit();
  if (!fits || (!given_ && ::ftruncate(memfd_, static_cast<off_t>(end_ + bytes)) != 0)) {
    *why = os_failure("ftruncate of the arena's memfd to " + format_bytes(end_ + bytes),
                      fits ? errno : EFBIG, OsLimit::file_size);
    return Status::out_of_memory;
  }
  *offset = end_;
  end_ += bytes;
  return Status::ok;
}

// Maps a view of the next bytes of the memfd; of more bytes than requested if addresses suffice.
Status HostSlots::map_extent(std::uint64_t bytes, std::string* why) {
  if (bytes > kMostBytes - mapped_) {
    *why = "the memfd would exceed 2^63 - 1 bytes";
    return Status::out_of_addresses;
  }
  const std::uint64_t ahead = std::min(mapped_ / 16, kLargestStep) / kGranularity * kGranularity;
  for (const std::uint64_t size : {std::max(bytes, ahead), bytes}) {
    std::byte* memory = reserve_aligned(size, kGranularity);
    if (!memory) continue;
    void* mapped =
        ::mmap(memory, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, memfd_,
               static_cast<off_t>(mapped_));
    if (mapped == MAP_FAILED || ::madvise(mapped, size, MADV_DONTFORK) != 0) {
      const int error = errno;
      ::munmap(memory, size);
      errno = error;
      continue;
    }
    extents_[mapped_] = {memory, size};
    mapped_ += size;
    return Status::ok;
  }
  *why = os_failure("mmap of " + format_bytes(bytes) + " of the arena", errno, OsLimit::addresses);
  return Status::out_of_addresses;
}

// Commits a slot's pages without a SIGBUS if memory runs out: as huge pages if the kernel can
// collapse them (it needs one page of each present), else as small ones.
bool HostSlots::populate(std::byte* slot, std::uint64_t offset, std::uint64_t bytes) {
  if (huge_pages_) {
    bool started = true;
    for (std::uint64_t at = 0; started && at < bytes; at += kGranularity)
      started = ::madvise(slot + at, 4096, kPopulateWrite) == 0;
    if (started && ::madvise(slot, bytes, kCollapse) == 0) return true;
  }
  if (::madvise(slot, bytes, kPopulateWrite) == 0) return true;
  return errno == EINVAL && ::fallocate(memfd_, FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                                        static_cast<off_t>(bytes)) == 0;
}

// Does nothing to a given memfd, whose contents are kept: other processes may still read them.
bool HostSlots::punch(std::uint64_t offset, std::uint64_t bytes) const {
  return given_ || ::fallocate(memfd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                               static_cast<off_t>(offset), static_cast<off_t>(bytes)) == 0;
}

}  // namespace warmserve
