// The place of every tensor in its layer, and the copies that fill the layers.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/safetensors_header.h"
#include "model/source.h"

namespace warmserve {

// Each tensor starts at a multiple of this in its layer, as in device allocators.
inline constexpr std::uint64_t kTensorAlignment = 256;

// Layers in execution order, as compact tables.
struct Layout {
  struct Place {
    std::uint64_t offset = 0, bytes = 0;  // in its layer; an empty tensor has offset 0
    std::uint32_t layer = 0;
  };

  std::shared_ptr<const TensorTable> table;
  StringList names;
  std::vector<std::uint64_t> bytes;          // of each layer
  std::vector<std::uint64_t> first_member;   // of each layer, then the end
  std::vector<std::uint64_t> first_segment;  // of each layer, then the end
  std::vector<std::uint32_t> members;        // tensor numbers by layer, in file order within one
  std::vector<Segment> segments;
  std::vector<Place> places;        // by a tensor's number
  std::vector<std::uint8_t> types;  // by a tensor's number: index into element_types()
  std::uint64_t total = 0;

  std::span<const std::uint32_t> members_of(std::size_t layer) const {
    return std::span(members).subspan(first_member[layer],
                                      first_member[layer + 1] - first_member[layer]);
  }
  std::span<const Segment> segments_of(std::size_t layer) const {
    return std::span(segments).subspan(first_segment[layer],
                                       first_segment[layer + 1] - first_segment[layer]);
  }
};

// Lays out every tensor in the layer group_of[its number]; layers without tensors are left out.
// `types` are the tensors' types in the arena, by number; if it is empty, they are the files'
// types. Throws invalid_argument if a cast between two types is unsupported, or if sizes overflow.
Layout lay_out(std::shared_ptr<const TensorTable> table, const StringList& group_names,
               std::span<const std::uint32_t> group_of, std::vector<std::uint8_t> types);

}  // namespace warmserve
