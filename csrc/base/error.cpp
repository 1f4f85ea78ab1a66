#include "base/error.h"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace warmserve {

std::exception_ptr cancelled(const std::string& why) {
  return std::make_exception_ptr(Error(ErrorKind::cancelled, why));
}

std::string format_bytes(std::uint64_t bytes) {
  const char* unit = "B";
  double value = static_cast<double>(bytes);
  for (const char* next : {"KiB", "MiB", "GiB", "TiB"}) {
    if (value < 1024) break;
    value /= 1024;
    unit = next;
  }
  char text[48];
  std::snprintf(text, sizeof text, "%.4g %s", value, unit);
  return text;
}

Error no_room(ErrorKind kind, const std::string& operation, std::uint64_t bytes,
              std::uint64_t budget, std::vector<Holder> holders) {
  std::string message =
      operation + " needs " + format_bytes(bytes) + " of a budget of " + format_bytes(budget);
  std::stable_sort(holders.begin(), holders.end(),
                   [](const Holder& a, const Holder& b) { return a.bytes > b.bytes; });
  if (holders.size() > 3) holders.resize(3);
  const char* separator = "; largest holders: ";
  for (const Holder& holder : holders) {
    message += std::exchange(separator, ", ");
    message += "'" + holder.name + "' " + format_bytes(holder.bytes);
    if (holder.leased) message += " (leased)";
  }
  return Error(kind, message);
}

}  // namespace warmserve
