// Which layer a tensor belongs to, as the common families name their tensors.
#pragma once

#include <memory>
#include <vector>

#include "checkpoint/safetensors_header.h"

namespace warmserve {

// Layers in execution order.
struct Groups {
  StringList names;
  std::vector<std::uint32_t> of;       // the layer of each tensor, by the tensor's number
  std::vector<std::uint32_t> members;  // numbers of tensors, layer by layer
};

// Groups tensors into blocks by the first number in each name. A tensor without a number belongs to
// the embedding, to the head, or to the last block of the stack with which its name shares the
// longest prefix. With `experts` each expert is a
// layer of its own, after the rest of its block. Throws invalid_argument if there is none then.
Groups group_by_name(const TensorTable& table, bool experts);

// For each name whether it begins with one of the stems and a dot.
std::vector<bool> begin_with_stems(const std::vector<std::string_view>& names,
                                   const std::vector<std::string_view>& stems);

}  // namespace warmserve
