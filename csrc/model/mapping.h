// Maps granules at a layer's addresses and unmaps them. The caller has marked the layers busy.
#pragma once

#include "model/state.h"

namespace warmserve {

// Maps the granules of layers of one model, in ascending order, and sets their access. One driver
// call maps adjacent layers. Called without the lock. After a throw some layers may be mapped,
// perhaps without access, which drain_and_unmap() undoes.
void map_layers(const Arena& arena, std::span<Layer* const> layers);

// Waits for the fences on the layers, then unmaps the layers. Drops the lock meanwhile. Afterwards
// no layer is busy. Each layer is absent, with its granules added to `freed`; or, if the wait
// ended early or the driver failed, in the state it had before it was claimed. Throws the first
// error.
// Guarantee: per layer.
void drain_and_unmap(SharedState& state, Lock& lock, std::vector<Layer*> layers, Deadline deadline,
                     const Poll& poll, std::vector<GranuleId>& freed);

}  // namespace warmserve
