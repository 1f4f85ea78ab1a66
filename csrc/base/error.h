// One exception type for the whole library and the one place that words its messages.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/types.h"

namespace warmserve {

enum class ErrorKind {
  general,               // WarmServeError
  invalid_argument,      // ValueError
  timeout,               // TimeoutError: a wait whose time ran out
  out_of_device_memory,  // OutOfDeviceMemory: would not fit even with nothing leased
  staging_timeout,       // StagingTimeout
  busy,                  // Busy: refused because of what is leased now
  cancelled,             // Cancelled
  corrupt_checkpoint,    // CorruptCheckpoint
  stale_view,            // StaleView
  device_lost,           // DeviceLost
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

// Who holds how much of the arena.
struct Holder {
  std::string name;
  std::uint64_t bytes = 0;
  bool leased = false;
};

// A reason for a ticket that was called off.
std::exception_ptr cancelled(const std::string& why);

std::string format_bytes(std::uint64_t bytes);

// "OPERATION needs N of a budget of M; held: 'a' 3 MiB (leased), ...": the three largest holders.
Error no_room(ErrorKind kind, const std::string& operation, std::uint64_t bytes,
              std::uint64_t budget, std::vector<Holder> holders);

}  // namespace warmserve
