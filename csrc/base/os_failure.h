// Error texts for system calls that failed.
#pragma once

#include <cstdint>
#include <string>

namespace warmserve {

// The limit of the process that a failed call may have reached.
enum class OsLimit { none, descriptors, addresses, file_size, threads };

// Returns a text such as "mmap of 2 MiB: Cannot allocate memory (errno 12); RLIMIT_AS (ulimit -v)
// is 1 GiB, ...". `call` names the call and its purpose. The text includes the current use of the
// limit if the system reports it.
std::string os_failure(const std::string& call, int error, OsLimit limit = OsLimit::none);

// Returns the largest size in bytes that the process may give a file, a memfd included.
std::uint64_t file_size_limit() noexcept;

}  // namespace warmserve
