// Over a neighbour's link to its memory, and from there to this device, peer to peer.
//
// The neighbour gives a few slots of its memory, each with a stream: while one slot's bytes go on
// to the device the next come in over the host link.
#pragma once

#include "load/route.h"
#include "memory/vmm.h"

namespace warmserve {

// Takes `slots` times `slot_bytes` of the neighbour's memory, in whole granules. Throws
// invalid_argument where the neighbour does not reach what `device` maps, and what the neighbour
// refuses. The neighbour's driver, and with it the memory, lives as long as the route. Blocks.
RoutePtr make_peer_route(const DevicePtr& neighbour, const Device& device, std::uint64_t slot_bytes,
                         unsigned slots = 4);

}  // namespace warmserve
