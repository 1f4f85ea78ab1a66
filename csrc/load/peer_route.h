// A route over a neighbour's host link to its memory, and from there peer to peer to this device.
//
// The route uses a few slots of the neighbour's memory, each with a stream. While the bytes of one
// slot are copied to the device, the next slot is filled over the neighbour's host link.
#pragma once

#include "load/route.h"
#include "memory/vmm.h"

namespace warmserve {

// Makes a route that takes `slots` times `slot_bytes` of the neighbour's memory, rounded up to
// whole granules. Throws invalid_argument if the neighbour cannot access the memory of `device`,
// and the errors of the neighbour's driver. The route keeps the neighbour's driver, and with it the
// memory, alive. Blocks.
RoutePtr make_peer_route(const DevicePtr& neighbour, const Device& device, std::uint64_t slot_bytes,
                         unsigned slots = 4);

}  // namespace warmserve
