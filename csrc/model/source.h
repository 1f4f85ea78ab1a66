// The sources of a model's bytes: open files, and the ranges in them that make a layer, copied or
// cast.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/types.h"
#include "kernels/kernels.h"
#include "model/digests.h"

namespace warmserve {

// The attributes of a file that must not change while a model uses it. Times are in nanoseconds
// since the epoch, modulo 2^64: they are only compared, and a signed number would overflow in the
// year 2262.
struct FileIdentity {
  std::uint64_t device = 0, inode = 0, size = 0;
  std::uint64_t mtime_ns = 0, ctime_ns = 0;
};

// An open file; owns the descriptor.
class File {
 public:
  File(int descriptor, std::string path, const FileIdentity& identity)
      : descriptor_(descriptor), path_(std::move(path)), identity_(identity) {}
  File(File&& other) noexcept;
  File& operator=(File&&) = delete;
  ~File();

  int descriptor() const noexcept { return descriptor_; }
  const std::string& path() const noexcept { return path_; }
  const FileIdentity& identity() const noexcept { return identity_; }
  // Throws corrupt_checkpoint, which says what changed, if the file has changed since registration.
  // Called after every read, because a read may return its full length although the file was
  // truncated meanwhile. If the bytes read have digests (`digests`), a change of ctime alone is
  // accepted: a link, a rename or a chmod causes it. A writer who resets mtime also causes it, and
  // the digests detect that.
  void check_unchanged(bool digests) const;

 private:
  int descriptor_;
  std::string path_;
  FileIdentity identity_;
};

// The file's content from file_offset on fills bytes [layer_offset, layer_offset + bytes) of the
// layer. Without a cast, the segment reads as many bytes as it fills; with one, as many elements,
// of the width that the cast reads.
struct Segment {
  std::uint32_t file = 0;
  std::uint64_t file_offset = 0, layer_offset = 0, bytes = 0;
  std::optional<CastKind> cast{};  // layer_offset and bytes are multiples of the width it writes
};

// The content of one layer. Segments ascend in layer_offset and do not overlap; bytes between and
// after them are zero. `digests` are the expected digests of some of its granules, ascending by
// granule; if it is empty, no granule is checked.
struct LayerSource {
  std::vector<Segment> segments;
  std::vector<ExpectedDigest> digests{};
};

// Fills layer bytes [begin, end) at the destination. Throws corrupt_checkpoint if a file has
// changed, general if the system cannot read it; the destination's content is then undefined.
// Blocks. Thread-safe.
// Precondition: if a segment casts, neither `begin`, `end` nor an edge of a block splits an
// element. Chunks and granules, which are multiples of 4 KiB, never do.
void read_layer(const std::vector<File>& files, const LayerSource& source, std::uint64_t begin,
                std::uint64_t end, const Destination& destination);

// Throws corrupt_checkpoint, as read_layer(), if a file of layer bytes [begin, end) has changed.
void check_files_unchanged(const std::vector<File>& files, const LayerSource& source,
                           std::uint64_t begin, std::uint64_t end);

}  // namespace warmserve
