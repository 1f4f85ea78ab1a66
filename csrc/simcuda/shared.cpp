#include "simcuda/shared.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "base/types.h"

namespace warmserve::simcuda {
namespace {

constexpr std::uint64_t kMagic = 0x7369'6d63'7564'6101;  // of this layout
constexpr std::uint64_t kPage = 4096;
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

std::uint64_t pages_of(const SharedFacts& facts) { return facts.bytes / facts.granularity; }

}  // namespace

std::uint64_t SharedFile::contents_at(const SharedFacts& facts) {
  static_assert(sizeof(Header) <= kPage && sizeof(Written) == kPage);
  return (1 + pages_of(facts)) * kPage;
}

std::uint64_t SharedFile::bytes_of(const SharedFacts& facts) {
  return contents_at(facts) + pages_of(facts) * facts.kept;
}

SharedFile::SharedFile(int descriptor, std::byte* memory, const SharedFacts& facts)
    : descriptor_(descriptor),
      memory_(memory),
      contents_at_(contents_at(facts)),
      bytes_(bytes_of(facts)) {
  ::madvise(memory_, bytes_, MADV_DONTFORK);  // a child does not inherit the device's memory
}

SharedFile::~SharedFile() {
  ::munmap(memory_, bytes_);
  ::close(descriptor_);
}

std::unique_ptr<SharedFile> SharedFile::make(const SharedFacts& facts) {
  const int file = ::memfd_create("simcuda allocation", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (file < 0) return nullptr;
  const std::uint64_t bytes = bytes_of(facts);
  std::uint64_t identity = 0;
  void* memory = MAP_FAILED;
  if (::fchmod(file, S_IRUSR | S_IWUSR) == 0 && ::ftruncate(file, static_cast<off_t>(bytes)) == 0 &&
      ::fcntl(file, F_ADD_SEALS, kSeals) == 0 &&
      ::getrandom(&identity, sizeof identity, 0) == sizeof identity)
    memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) {
    ::close(file);
    return nullptr;
  }
  auto* const header = new (memory) Header{kMagic, identity, facts, 0, {}};
  pthread_mutexattr_t kind;
  ::pthread_mutexattr_init(&kind);
  ::pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
  ::pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
  ::pthread_mutex_init(&header->mutex, &kind);
  ::pthread_mutexattr_destroy(&kind);
  return std::unique_ptr<SharedFile>(new SharedFile(file, static_cast<std::byte*>(memory), facts));
}

std::unique_ptr<SharedFile> SharedFile::open(int descriptor) {
  struct stat info{};
  Header header{};
  // Only a file with these seals is mapped: any other one could end before its last page is read.
  if (::fstat(descriptor, &info) != 0 || !S_ISREG(info.st_mode) ||
      ::fcntl(descriptor, F_GET_SEALS) != kSeals ||
      ::pread(descriptor, &header, sizeof header, 0) != sizeof header || header.magic != kMagic ||
      bytes_of(header.facts) != static_cast<std::uint64_t>(info.st_size))
    return nullptr;
  const int file = ::fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (file < 0) return nullptr;
  void* const memory =
      ::mmap(nullptr, bytes_of(header.facts), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory != MAP_FAILED)
    return std::unique_ptr<SharedFile>(
        new SharedFile(file, static_cast<std::byte*>(memory), header.facts));
  ::close(file);
  return nullptr;
}

SharedFile::Guard::Guard(SharedFile& file) : mutex_(file.header().mutex) {
  if (::pthread_mutex_lock(&mutex_) != EOWNERDEAD) return;
  ::pthread_mutex_consistent(&mutex_);
  const SharedFacts& facts = file.facts();
  for (std::uint64_t page = 0; page < pages_of(facts); ++page)
    file.store(page, {{0, static_cast<std::uint32_t>(facts.granularity)}});
}

SharedFile::Guard::~Guard() { ::pthread_mutex_unlock(&mutex_); }

SharedFile::Written& SharedFile::record(std::uint64_t page) const {
  return *reinterpret_cast<Written*>(memory_ + (1 + page) * kPage);
}

std::vector<Range> SharedFile::written(std::uint64_t page) {
  const Guard guard(*this);
  return load(page);
}

std::vector<Range> SharedFile::load(std::uint64_t page) const {
  const Written& record = this->record(page);
  return {record.ranges, record.ranges + record.count};
}

void SharedFile::store(std::uint64_t page, std::vector<Range> ranges) {
  while (ranges.size() > kMostRanges) {
    std::size_t least = 1;
    for (std::size_t i = 2; i < ranges.size(); ++i)
      if (ranges[i].begin - ranges[i - 1].end < ranges[least].begin - ranges[least - 1].end)
        least = i;
    ranges[least - 1].end = ranges[least].end;
    ranges.erase(ranges.begin() + static_cast<std::ptrdiff_t>(least));
  }
  Written& record = this->record(page);
  std::copy(ranges.begin(), ranges.end(), record.ranges);
  record.count = ranges.size();
}

}  // namespace warmserve::simcuda
