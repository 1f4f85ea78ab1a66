// A route over a peer's host link to its memory, and from there to this device.
//
// The route uses a few slots of the peer's memory, each with a stream. While the bytes of one
// slot are copied to the device, the next slot is filled over the peer's host link.
#pragma once

#include "load/route.h"
#include "memory/vmm.h"

namespace warmserve {

// Makes a route that takes `slots` times `slot_bytes` of the peer's memory, rounded up to
// whole granules. Throws invalid_argument if the peer cannot access the memory of `device`,
// and the errors of the peer's driver. The route keeps the peer's driver, and with it the
// memory, alive. Blocks.
RoutePtr make_peer_route(const DevicePtr& peer, const Device& device, std::uint64_t slot_bytes,
                         unsigned slots = 4);

}  // namespace warmserve
