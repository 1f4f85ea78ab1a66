// The bytes of a load: writing them through the host's view of granules or to the host cache, and
// comparing digests.
#include <algorithm>
#include <thread>

#include "load/loader.h"

namespace warmserve {

std::uint64_t Loader::write_through_host_view(const LayerLoad& load, std::uint64_t begin,
                                              std::uint64_t end, Deadline not_before,
                                              std::span<std::uint64_t> sums) {
  const Arena& arena = state_.arena;
  const Layer& layer = *load.layer;
  const std::uint64_t granule_bytes = arena.granule_bytes();
  const std::size_t first = begin / granule_bytes;
  Destination destination{first * granule_bytes, granule_bytes, {}};
  for (std::size_t i = first; i * granule_bytes < end; ++i)
    destination.blocks.push_back(arena.host_view(layer.granules[i]));
  read_layer(load.model->files, layer.source, begin, end, destination);
  add_to_digests(layer.source.digests, {granule_bytes, layer.bytes}, destination, begin, end, sums);
  std::this_thread::sleep_until(not_before);
  for (std::size_t i = first; i * granule_bytes < end; ++i) {
    const std::uint64_t from = std::max(begin, i * granule_bytes);
    const std::uint64_t to = std::min(end, (i + 1) * granule_bytes);
    arena.device()->driver().host_wrote(arena.handle(layer.granules[i]), from % granule_bytes,
                                        to - from);
  }
  return end - begin;
}

std::uint64_t Loader::read_into_image(const LayerLoad& load, std::uint64_t begin, std::uint64_t end,
                                      Deadline not_before, std::span<std::uint64_t> sums) {
  const Layer& layer = *load.layer;
  const Destination memory = load.image->memory(begin, end);
  read_layer(load.model->files, layer.source, begin, end, memory);
  state_.arena.device()->driver().host_read(end - begin);
  add_to_digests(layer.source.digests, {state_.arena.granule_bytes(), layer.bytes}, memory, begin,
                 end, sums);
  std::this_thread::sleep_until(not_before);
  return end - begin;
}

// Returns the error of a layer whose bytes were all read but do not match its digests; else null.
std::exception_ptr Loader::wrong_content(const LayerLoad& load) const {
  const Layer& layer = *load.layer;
  const GranuleCut cut{state_.arena.granule_bytes(), layer.bytes};
  const auto granule = wrong_granule(layer.source.digests, cut, load.sums);
  if (!granule) return nullptr;
  std::string files;
  const File* last = nullptr;
  for (const Segment& segment : layer.source.segments) {
    const File* file = &load.model->files[segment.file];
    if (segment.layer_offset >= cut.end(*granule) || file == last ||
        segment.layer_offset + segment.bytes <= cut.begin(*granule))
      continue;
    files += (last ? ", " : "") + file->path();
    last = file;
  }
  return std::make_exception_ptr(
      Error(ErrorKind::corrupt_checkpoint,
            files + ": granule " + std::to_string(*granule) + " of layer " +
                std::to_string(layer.index) + " of '" + load.model->name +
                "' does not match its digest: the file was changed or is damaged; "
                "Runtime.reload() takes the model as its files are now"));
}

}  // namespace warmserve
