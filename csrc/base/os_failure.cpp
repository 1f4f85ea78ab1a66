#include "base/os_failure.h"

#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <system_error>

#include "base/error.h"

namespace warmserve {
namespace {

std::string value_of(rlim_t value, bool bytes) {
  if (value == RLIM_INFINITY) return "unlimited";
  return bytes ? format_bytes(value) : std::to_string(value);
}

std::string limit_text(const char* name, __rlimit_resource resource, bool bytes) {
  struct rlimit limit{};
  if (::getrlimit(resource, &limit) != 0) return std::string(name) + " is unknown";
  return std::string(name) + " is " + value_of(limit.rlim_cur, bytes);
}

std::string addresses_text() {
  std::string text = limit_text("RLIMIT_AS (ulimit -v)", RLIMIT_AS, true);
  std::uint64_t pages = 0, most = 0, count = 0;
  if (std::ifstream("/proc/self/statm") >> pages)
    text += ", used: " + format_bytes(pages * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)));
  if (std::ifstream("/proc/sys/vm/max_map_count") >> most) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) ++count;
    text += "; vm.max_map_count is " + std::to_string(most) + ", used: " + std::to_string(count);
  }
  return text;
}

std::string text_of(OsLimit limit) {
  switch (limit) {
    case OsLimit::descriptors: return limit_text("RLIMIT_NOFILE (ulimit -n)", RLIMIT_NOFILE, false);
    case OsLimit::addresses: return addresses_text();
    case OsLimit::file_size: return limit_text("RLIMIT_FSIZE (ulimit -f)", RLIMIT_FSIZE, true);
    case OsLimit::threads: return limit_text("RLIMIT_NPROC (ulimit -u)", RLIMIT_NPROC, false);
    case OsLimit::none: break;
  }
  return {};
}

}  // namespace

std::string os_failure(const std::string& call, int error, OsLimit limit) {
  std::string text = call + ": " + std::generic_category().message(error) + " (errno " +
                     std::to_string(error) + ")";
  if (const std::string met = text_of(limit); !met.empty()) text += "; " + met;
  return text;
}

std::uint64_t file_size_limit() noexcept {
  struct rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kMostBytes;
  return limit.rlim_cur;
}

}  // namespace warmserve
