// The one exception type of the library, and text that several messages share.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/types.h"

namespace warmserve {

// The kinds of errors, each with the Python exception that it becomes.
//   timeout               a wait reached its deadline
//   out_of_device_memory  would not fit even if no layer were leased
//   busy                  refused because of the current leases
#define WARMSERVE_ERROR_KINDS(X)             \
  X(general, WarmServeError)                 \
  X(invalid_argument, ValueError)            \
  X(timeout, TimeoutError)                   \
  X(out_of_device_memory, OutOfDeviceMemory) \
  X(staging_timeout, StagingTimeout)         \
  X(busy, Busy)                              \
  X(cancelled, Cancelled)                    \
  X(corrupt_checkpoint, CorruptCheckpoint)   \
  X(stale_view, StaleView)                   \
  X(device_lost, DeviceLost)

enum class ErrorKind {
#define X(kind, python) kind,
  WARMSERVE_ERROR_KINDS(X)
#undef X
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

// A model and the bytes of the arena that it holds.
struct Holder {
  std::string name;
  std::uint64_t bytes = 0;
  bool leased = false;
};

// Makes the error of a cancelled ticket.
std::exception_ptr cancelled(const std::string& why);

std::string format_bytes(std::uint64_t bytes);

// Words the message "OPERATION needs N of a budget of M; largest holders: 'a' 3 MiB (leased), ...",
// which names the three largest holders.
Error no_room(ErrorKind kind, const std::string& operation, std::uint64_t bytes,
              std::uint64_t budget, std::vector<Holder> holders);

}  // namespace warmserve
