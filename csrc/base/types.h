// The basic types of this code base. Bytes are std::uint64_t everywhere; durations are std::chrono.
// csrc/README.md defines the words "granule", "reservation", "layer", "fence" and others.
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
