// The key of a layer's bytes (memory/contents.h).
#pragma once

#include "model/model.h"

namespace warmserve {

// Computes a key of 128 bits from the model's name, the identities of the files, the layer's ranges
// in them, and the expected digests. The name is a part of it, so that two models never share
// granules. The digests are, so that bytes which were never checked are not taken for checked ones.
ContentKey content_key(const Model& model, const Layer& layer);

}  // namespace warmserve
