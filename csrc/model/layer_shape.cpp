#include "model/layer_shape.h"

#include <algorithm>
#include <limits>

namespace warmserve {
namespace {

// Returns whether the segment's cast would split an element.
bool cuts_elements(const Segment& segment) {
  if (!segment.cast) return false;
  const std::uint64_t width = widths(*segment.cast).to;
  return width == 0 || segment.layer_offset % width || segment.bytes % width;
}

// Returns whether the bytes that the segment reads lie in the file. A cast reads more or fewer
// bytes than it writes.
bool inside(const Segment& segment, const File& file) {
  std::uint64_t count = segment.bytes, width = 1;
  if (segment.cast) {
    count /= widths(*segment.cast).to;
    width = widths(*segment.cast).from;
  }
  const std::uint64_t size = std::min(file.identity().size, kMostBytes);
  return segment.file_offset <= size && count <= (size - segment.file_offset) / width;
}

}  // namespace

void check_layout(const std::string& name, const std::vector<File>& files,
                  const std::vector<LayerShape>& layers, std::uint64_t granule_bytes) {
  if (layers.size() > std::numeric_limits<std::uint32_t>::max())
    throw Error(ErrorKind::invalid_argument,
                "'" + name + "' has " + std::to_string(layers.size()) + " layers; at most " +
                    std::to_string(std::numeric_limits<std::uint32_t>::max()) + " are accepted");
  std::uint64_t granules = 0;
  for (const LayerShape& layer : layers) {
    std::uint64_t end = 0;
    if (layer.bytes <= kMostBytes) granules += ceil_div(layer.bytes, granule_bytes);
    if (layer.bytes > kMostBytes || granules > kMostBytes / granule_bytes)
      throw Error(ErrorKind::invalid_argument,
                  "the layers of '" + name + "', in granules of " + format_bytes(granule_bytes) +
                      ", take more than 2^63 - 1 bytes, the limit of a model");
    for (const Segment& segment : layer.segments) {
      if (segment.file >= files.size() || segment.layer_offset < end ||
          segment.bytes > layer.bytes || segment.layer_offset > layer.bytes - segment.bytes)
        throw Error(ErrorKind::invalid_argument,
                    "a segment of '" + name + "' is out of order or outside of its layer");
      if (cuts_elements(segment))
        throw Error(ErrorKind::invalid_argument, "a cast of '" + name + "' splits an element");
      if (const File& file = files[segment.file]; !inside(segment, file))
        throw Error(ErrorKind::corrupt_checkpoint,
                    file.path() + " has " + std::to_string(file.identity().size) +
                        " bytes, and a segment of '" + name + "' that begins at byte " +
                        std::to_string(segment.file_offset) + " ends beyond them");
      end = segment.layer_offset + segment.bytes;
    }
  }
}

}  // namespace warmserve
