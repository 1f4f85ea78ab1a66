// The options of a simulated driver. simcuda.h describes each option.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "base/types.h"
#include "simcuda/functions.h"

namespace warmserve::simcuda {

using Nanoseconds = std::int64_t;

enum class Engine { h2d, d2h, d2d };
constexpr std::size_t kEngines = 3;
const char* name_of(Engine engine) noexcept;

constexpr int kMaxDevices = 8;

struct Cost {
  double call = 0, granule = 0;  // nanoseconds
};

// "virtual_time" is the time of one thread; costs of several threads add up. In "concurrent" time
// they overlap: time advances when every thread of the process waits.
enum class ClockKind { real, virtual_time, concurrent };

struct Options {
  int devices = 1;
  std::optional<std::vector<int>> visible;
  std::string name = "Simulated CUDA";
  int driver_version = 13000, capability = 90;
  std::uint64_t memory = 8 * kGiB, granularity = 2 * kMiB;
  bool peers = false;  // any two devices are peers
  bool integrated = false, host_numa = false, posix_fd = true, rdma = true;
  bool read_only_register = true;
  int numa_node = 0;
  ClockKind clock = ClockKind::real;
  bool detector = true;
  std::array<double, kEngines> rates{};  // bytes per second; 0: no pacing
  Nanoseconds launch = 0, copy_start = 0;
  std::array<Cost, kFunctions> costs{};
  bool any_cost = false;
  bool mapping_lock = false, context_lock = false;
  double mapping_beside_copies = 1;
  double read = 0, dram = 0;  // bytes per second; 0: no limit
  std::uint64_t content = 0;
  std::string machine;

  bool virtual_clock() const { return clock != ClockKind::real; }
  bool concurrent() const { return clock == ClockKind::concurrent; }
  // Returns the indices of the devices that a program sees.
  std::vector<int> visible_devices() const;
  // Returns whether cuMemCreate can allocate memory of the host, which the CPU can access at the
  // device's addresses.
  bool host_memory() const { return integrated || host_numa; }
  // Returns the number of leading bytes of a granule whose content is kept.
  std::uint64_t kept() const { return content == 0 ? granularity : std::min(content, granularity); }
};

// Parses lines of options. Returns false and sets `error` if a line is not a valid option.
bool parse_options(const std::string& text, Options* out, std::string* error);

}  // namespace warmserve::simcuda
