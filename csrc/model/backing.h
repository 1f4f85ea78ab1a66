// Puts granules behind a layer's addresses and takes them away. The layers are owned by the
// caller.
#pragma once

#include "model/residency.h"

namespace warmserve {

// Maps layer.granules and sets access. Without the lock. What a throw leaves mapped, without
// access, is drain()'s to take away.
void back(const Arena& arena, Layer& layer);

// Waits for the fences of the layers' models, then unmaps what is draining. Drops the lock while
// it does. Afterwards no layer is owned; each is absent, with its granules added to `freed`, or,
// where the wait ended early or the driver failed, what it was before it was claimed. Throws the
// first error. Per layer.
void drain(Books& books, Lock& lock, std::vector<Layer*> layers, Deadline deadline,
           const Poll& poll, std::vector<GranuleId>& freed);

}  // namespace warmserve
