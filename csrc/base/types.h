// The words and the basic types of the native core. Bytes are std::uint64_t everywhere; durations
// are std::chrono.
//
// Memory
//   granule      one physical allocation of a device, 2 MiB or a multiple of it; neither a page of
//                the operating system nor a block of a KV cache
//   arena        the granules of one device, and the budget that limits their number
//   reservation  addresses without memory; a model has one, kept as long as any view of it exists
//   mapping      granules placed in a reservation, with an access right
//   poison       a granule of NaN, mapped at the addresses of evicted layers to find stale reads
//   staging      bounded pinned host memory; loads pass it if the CPU cannot write granules
//   host cache   pinned host memory that keeps layers which have been loaded
//   image        a layer's bytes in the host cache, in the layer's layout
//   slab, unit   a pinned region of the host cache; the part of it that is lent at once
//   chunk        a block of staging memory; also the bytes that a loader thread loads at once
//
// Models
//   layer        the unit of residency: tensors in execution order; it starts on a granule
//   residency    absent, filling, resident or draining (Residency, in model/model.h)
//   busy         said of a layer on which a thread works without the runtime's lock
//   keep value   set by the caller for each layer; layers with the lowest value are evicted first
//   epoch        a number that changes so that readers look again: a model's backing epoch with
//                the granules at its addresses, its lease epoch with the leases on it
//
// Use
//   lease        protects layers from eviction; it may begin while its layers are still arriving
//   pass         one computation on a model by one thread; until it ends, it holds the layers that
//                were leased when it began
//   owner        the thread or task to which a lease belongs
//   fence        a position in a stream; the memory that it guards is not unmapped before the
//                stream has reached it
//
// Loading
//   load         one layer's way from absent to resident, for all tickets that want the layer
//   ticket       a caller's handle to work in progress
//   generation   of a load: counts how often a first ticket joined it while no ticket wanted it
//   preempted    said of a load whose granules a load of higher priority needs; it starts again
//   link         carries bytes to the device: the device's own host link, or a route
//   route        a way from pinned host memory to the device beside the device's own link
//   peer         another device, whose link and memory a route uses
//   piece        the bytes of a chunk that go over one link together
//   completion   the outcome of copies that were sent
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>

namespace warmserve {

using Address = std::uint64_t;       // a device virtual address
using GranuleId = std::uint32_t;     // index of a granule in its arena
enum class Handle : std::uint64_t {  // a driver's name for one physical granule
  none = 0
};
enum class StreamId : std::uint64_t {};  // a driver's name for a stream; CUDA: the CUstream
enum class EventId : std::uint64_t {};   // a driver's name for an event; CUDA: the CUevent

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;
constexpr Deadline kNever = Deadline::max();

// A waiting thread calls it about every 20 ms, with no lock held. It may throw (Ctrl-C does): the
// waiting operation then undoes itself and passes the exception on.
using Poll = std::function<void()>;
constexpr auto kPollInterval = std::chrono::milliseconds(20);

constexpr std::uint64_t kKiB = 1024, kMiB = 1024 * kKiB, kGiB = 1024 * kMiB;

// The largest size, count or offset that we accept from a file or a caller. The sum of two such
// values fits in 64 bits, and each fits in an off_t and in the signed sizes of numpy and DLPack.
constexpr std::uint64_t kMostBytes = std::numeric_limits<std::int64_t>::max();

constexpr std::uint64_t ceil_div(std::uint64_t value, std::uint64_t by) {
  return value / by + (value % by != 0);
}

}  // namespace warmserve
