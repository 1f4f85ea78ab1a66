// Maps granules at a layer's addresses and unmaps them. The caller has marked the layers busy.
#pragma once

#include "model/state.h"

namespace warmserve {

// Maps layer.granules and sets their access. Called without the lock. A throw may leave a mapping
// without access, which drain_and_unmap() removes.
void map_layer(const Arena& arena, Layer& layer);

// Waits for the fences on the layers, then unmaps the layers. Drops the lock meanwhile. Afterwards
// no layer is busy. Each layer is absent, with its granules added to `freed`; or, if the wait
// ended early or the driver failed, in the state it had before it was claimed. Throws the first
// error.
// Guarantee: per layer.
void drain_and_unmap(SharedState& state, Lock& lock, std::vector<Layer*> layers, Deadline deadline,
                     const Poll& poll, std::vector<GranuleId>& freed);

}  // namespace warmserve
