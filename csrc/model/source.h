// Where a model's bytes come from: open files, and the ranges of them that make a layer, as they
// are or cast on the way.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/types.h"
#include "kernels/kernels.h"
#include "model/digests.h"

namespace warmserve {

// What must not change while a model uses a file. Times in nanoseconds since the epoch, modulo
// 2^64: they are compared alone, and a signed number would overflow in the year 2262.
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
  // Throws corrupt_checkpoint, which says what changed, unless the file is what it was when it was
  // registered. Said after every read: a read may return its full length although the file was cut
  // meanwhile. With `digests` of what was read a change of ctime alone is let pass: a link, a
  // rename or a chmod changes it, and so does a writer who sets mtime back, whom the digests find.
  void check_unchanged(bool digests) const;

 private:
  int descriptor_;
  std::string path_;
  FileIdentity identity_;
};

// What lies in a file from file_offset on is bytes [layer_offset, + bytes) of the layer. As many
// bytes of the file; with a cast as many elements, in the file of the width that the cast reads.
struct Segment {
  std::uint32_t file = 0;
  std::uint64_t file_offset = 0, layer_offset = 0, bytes = 0;
  std::optional<CastKind> cast{};  // both of the layer's numbers are multiples of what it writes
};

// What makes one layer. Segments ascend in layer_offset and do not overlap; what lies between them
// and after them is zero. `digests` are those that granules of it must have, ascending by granule;
// none are checked without them.
struct LayerSource {
  std::vector<Segment> segments;
  std::vector<ExpectedDigest> digests{};
};

// Fills layer bytes [begin, end) at the destination. Where a segment casts, neither begin, end nor
// an edge of a block may cut an element; chunks and granules, multiples of 4 KiB, do not. Throws
// corrupt_checkpoint when a file is not what it was, general when the system cannot read it; bytes
// written until then are undefined. Blocks; safe from many threads.
void read_layer(const std::vector<File>& files, const LayerSource& source, std::uint64_t begin,
                std::uint64_t end, const Destination& destination);

}  // namespace warmserve
