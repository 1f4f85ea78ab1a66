// Words for a system call that failed.
#pragma once

#include <cstdint>
#include <string>

namespace warmserve {

// The limit of the process that a call may have met.
enum class OsLimit { none, descriptors, addresses, file_size, threads };

// "mmap of 2 MiB: Cannot allocate memory (errno 12); RLIMIT_AS (ulimit -v) is 1 GiB, ...". `call`
// names the call and what it was for; what is used of the limit is told where the system says it.
std::string os_failure(const std::string& call, int error, OsLimit limit = OsLimit::none);

// Bytes that the process may write to a file, and so make a memfd long.
std::uint64_t file_size_limit() noexcept;

}  // namespace warmserve
