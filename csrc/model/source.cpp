#include "model/source.h"

#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace warmserve {
namespace {

constexpr std::size_t kMostVectors = 64;
constexpr std::size_t kSliceBytes = 256 * kKiB;  // stays in a core's own cache

void fill_zero(const Destination& destination, std::uint64_t begin, std::uint64_t end) {
  for_each_piece(destination, begin, end,
                 [](std::byte* memory, std::uint64_t bytes) { std::memset(memory, 0, bytes); });
}

void read_range(const File& file, std::uint64_t offset, const Destination& destination,
                std::uint64_t begin, std::uint64_t end) {
  while (begin < end) {
    iovec vectors[kMostVectors];
    int count = 0;
    for_each_piece(destination, begin, end, [&](std::byte* memory, std::uint64_t bytes) {
      if (static_cast<std::size_t>(count) < kMostVectors) vectors[count++] = {memory, bytes};
    });
    const ssize_t got = ::preadv(file.descriptor(), vectors, count, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      throw Error(ErrorKind::general,
                  "reading " + file.path() + ": " + std::generic_category().message(errno));
    if (got == 0)
      throw Error(ErrorKind::corrupt_checkpoint,
                  file.path() + " ends at byte " + std::to_string(offset) + ", inside a tensor");
    begin += static_cast<std::uint64_t>(got);
    offset += static_cast<std::uint64_t>(got);
  }
}

// As read_range, but casts each slice of the file in the thread's own memory. The CPU casts even if
// the device could: a narrowing cast saves bus traffic, and the device needs neither memory for the
// wider source nor kernels. The cast costs little beside the copy out of the page cache, because a
// slice is still in the CPU's cache.
void cast_range(const File& file, std::uint64_t offset, CastKind kind,
                const Destination& destination, std::uint64_t begin, std::uint64_t end) {
  thread_local std::vector<std::byte> memory(kSliceBytes);
  const Destination slice{0, kSliceBytes, {memory.data()}};
  const Widths width = widths(kind);
  while (begin < end) {
    const std::uint64_t count = std::min((end - begin) / width.to, kSliceBytes / width.from);
    read_range(file, offset, slice, 0, count * width.from);
    auto source = reinterpret_cast<Address>(memory.data());
    for_each_piece(destination, begin, begin + count * width.to, [&](std::byte* to, auto bytes) {
      const std::uint64_t elements = bytes / width.to;
      run_on_cpu(CastCall{
          .kind = kind, .from = source, .to = reinterpret_cast<Address>(to), .count = elements});
      source += elements * width.from;
    });
    begin += count * width.to;
    offset += count * width.from;
  }
}

std::uint64_t nanoseconds(const timespec& time) {
  return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000 +
         static_cast<std::uint64_t>(time.tv_nsec);
}

// Returns how a file has changed; "" if it has not.
std::string difference(const FileIdentity& was, const FileIdentity& now, bool deleted,
                       bool digests) {
  if (was.device != now.device || was.inode != now.inode) return "it is another file";
  if (was.size != now.size)
    return "its size is " + std::to_string(now.size) + " and was " + std::to_string(was.size);
  if (was.mtime_ns != now.mtime_ns) return "it was written or touched";
  if (was.ctime_ns == now.ctime_ns || digests) return "";
  return deleted ? "its name was given to another file or deleted"
                 : "it was linked, renamed, or its mode, owner or attributes were changed";
}

}  // namespace

File::File(File&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      path_(std::move(other.path_)),
      identity_(other.identity_) {}

File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void File::check_unchanged(bool digests) const {
  struct stat status{};
  if (::fstat(descriptor_, &status) != 0)
    throw Error(ErrorKind::general,
                "fstat of " + path_ + ": " + std::generic_category().message(errno));
  const FileIdentity now{static_cast<std::uint64_t>(status.st_dev),
                         static_cast<std::uint64_t>(status.st_ino),
                         static_cast<std::uint64_t>(status.st_size), nanoseconds(status.st_mtim),
                         nanoseconds(status.st_ctim)};
  const std::string what = difference(identity_, now, status.st_nlink == 0, digests);
  if (!what.empty())
    throw Error(ErrorKind::corrupt_checkpoint,
                path_ + " was replaced or changed since it was registered: " + what +
                    "; Runtime.reload() accepts the files as they are now");
}

void read_layer(const std::vector<File>& files, const LayerSource& source, std::uint64_t begin,
                std::uint64_t end, const Destination& destination) {
  auto segment =
      std::partition_point(source.segments.begin(), source.segments.end(),
                           [&](const Segment& s) { return s.layer_offset + s.bytes <= begin; });
  for (std::uint64_t at = begin; at < end;) {
    if (segment == source.segments.end() || segment->layer_offset >= end) {
      fill_zero(destination, at, end);
      break;
    }
    if (segment->layer_offset > at) fill_zero(destination, at, segment->layer_offset);
    at = std::max(at, segment->layer_offset);
    const std::uint64_t stop = std::min(end, segment->layer_offset + segment->bytes);
    const File& file = files[segment->file];
    const std::uint64_t done = at - segment->layer_offset;
    if (segment->cast) {
      const auto [from, to] = widths(*segment->cast);
      cast_range(file, segment->file_offset + done / to * from, *segment->cast, destination, at,
                 stop);
    } else {
      read_range(file, segment->file_offset + done, destination, at, stop);
    }
    file.check_unchanged(!source.digests.empty());
    at = stop;
    ++segment;
  }
}

void check_files_unchanged(const std::vector<File>& files, const LayerSource& source,
                           std::uint64_t begin, std::uint64_t end) {
  const File* last = nullptr;
  for (const Segment& segment : source.segments) {
    const File* const file = &files[segment.file];
    if (segment.layer_offset >= end) break;
    if (segment.layer_offset + segment.bytes <= begin || file == last) continue;
    file->check_unchanged(!source.digests.empty());
    last = file;
  }
}

}  // namespace warmserve
