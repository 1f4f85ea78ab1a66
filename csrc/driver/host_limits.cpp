#include "driver/host_limits.h"

#include <sys/sysinfo.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace warmserve {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

std::optional<std::uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  std::uint64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;  // absent, or the word "max"
}

// Returns the bytes left in a control group and all groups above it. The usage includes page cache,
// which the kernel reclaims on demand, so page cache counts as available, as it does in
// MemAvailable.
std::uint64_t room_in_groups(const std::string& root, std::string group, const char* limit_file,
                             const char* usage_file) {
  std::uint64_t room = kUnlimited;
  for (;;) {
    const std::string directory = root + group;
    const auto limit = read_number(directory + "/" + limit_file);
    const auto usage = read_number(directory + "/" + usage_file);
    if (limit && usage) {
      std::uint64_t own = 0, total = 0,
                    value = 0;  // version 1 counts the groups below in `total` only
      std::ifstream stat(directory + "/memory.stat");
      for (std::string key; stat >> key >> value;) {
        if (key == "inactive_file" || key == "active_file") own += value;
        if (key == "total_inactive_file" || key == "total_active_file") total += value;
      }
      const std::uint64_t reclaimable = std::max(own, total);
      const std::uint64_t used = *usage > reclaimable ? *usage - reclaimable : 0;
      room = std::min(room, *limit > used ? *limit - used : 0);
    }
    const auto slash = group.rfind('/');
    if (group.empty() || slash == std::string::npos) return room;
    group.resize(slash);
  }
}

}  // namespace

std::uint64_t available_memory(const std::string& root) {
  std::uint64_t room = kUnlimited;
  std::ifstream meminfo(root + "/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);)
    if (line.rfind("MemAvailable:", 0) == 0) room = std::stoull(line.substr(13)) * kKiB;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "id:controllers:path"
    const auto first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    const std::string top = root + "/sys/fs/cgroup";
    if (controllers.empty())
      room = std::min(room, room_in_groups(top, path, "memory.max", "memory.current"));
    else if (controllers == "memory")
      room = std::min(room, room_in_groups(top + "/memory", path, "memory.limit_in_bytes",
                                           "memory.usage_in_bytes"));
  }
  return room;
}

std::uint64_t total_memory() {
  struct sysinfo info{};
  if (::sysinfo(&info) != 0) return 0;
  return static_cast<std::uint64_t>(info.totalram) * info.mem_unit;
}

std::uint64_t mapping_limit() { return read_number("/proc/sys/vm/max_map_count").value_or(65530); }

std::uint64_t mapping_count() {
  std::ifstream maps("/proc/self/maps");
  std::uint64_t lines = 0;
  for (std::string line; std::getline(maps, line);) ++lines;
  return lines;
}

}  // namespace warmserve
