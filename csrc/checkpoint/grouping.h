// Assigns tensors to layers by the tensor names of the common model families.
#pragma once

#include <memory>
#include <vector>

#include "checkpoint/safetensors_header.h"

namespace warmserve {

// Layers in execution order.
struct Groups {
  StringList names;
  std::vector<std::uint32_t> of;       // each tensor's layer, by the tensor's number
  std::vector<std::uint32_t> members;  // numbers of tensors, layer by layer
};

// Groups tensors into blocks by the first number in each name. A tensor without a number belongs to
// the embedding, to the head, or to the last block of the stack with which its name shares the
// longest prefix. With `experts`, each expert is a layer of its own, after the rest of its block;
// throws invalid_argument if no tensor belongs to an expert.
Groups group_by_name(const TensorTable& table, bool experts);

// Returns for each name whether it begins with a stem followed by a dot.
std::vector<bool> begin_with_stems(const std::vector<std::string_view>& names,
                                   const std::vector<std::string_view>& stems);

}  // namespace warmserve
