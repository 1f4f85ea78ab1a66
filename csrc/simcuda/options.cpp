#include "simcuda/options.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <sstream>

namespace warmserve::simcuda {
namespace {

std::string stripped(const std::string& text) {
  const auto first = text.find_first_not_of(" \t\r");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

bool parse(const std::string& text, double* out) {
  char* end = nullptr;
  *out = std::strtod(text.c_str(), &end);
  return !text.empty() && *end == 0 && std::isfinite(*out) && *out >= 0;
}

bool parse(const std::string& text, std::uint64_t* out) {
  char* end = nullptr;
  *out = std::strtoull(text.c_str(), &end, 10);
  return !text.empty() && text[0] != '-' && *end == 0;
}

bool parse(const std::string& text, int* out) {
  std::uint64_t value = 0;
  if (!parse(text, &value) || value > 1'000'000) return false;
  *out = static_cast<int>(value);
  return true;
}

bool parse(const std::string& text, bool* out) {
  *out = text == "1";
  return text == "0" || text == "1";
}

bool parse_visible(const std::string& text, std::optional<std::vector<int>>* out) {
  out->emplace();
  std::istringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    int index = -1;  // an item that is not a number counts as an invalid index
    if (!parse(stripped(item), &index)) index = -1;
    (*out)->push_back(index);
  }
  return true;
}

bool parse_cost(const std::string& function, const std::string& text, Options* out) {
  const auto named = functions_named(function.c_str());
  const auto plus = text.find('+');
  double call = 0, granule = 0;
  if (named.empty() || !parse(stripped(text.substr(0, plus)), &call)) return false;
  if (plus != std::string::npos && !parse(stripped(text.substr(plus + 1)), &granule)) return false;
  for (const Function one : named)
    out->costs[static_cast<std::size_t>(one)] = {call * 1e3, granule * 1e3};
  out->any_cost = true;
  return true;
}

bool parse_clock(const std::string& text, ClockKind* out) {
  *out = text == "virtual"      ? ClockKind::virtual_time
         : text == "concurrent" ? ClockKind::concurrent
                                : ClockKind::real;
  return *out != ClockKind::real || text == "real";
}

// Parses a number from -1 on.
bool parse_node(const std::string& text, int* out) {
  if (text == "-1") {
    *out = -1;
    return true;
  }
  return parse(text, out);
}

bool parse_seconds(const std::string& text, Nanoseconds* out) {
  double seconds = 0;
  if (!parse(text, &seconds) || seconds > 1e6) return false;
  *out = static_cast<Nanoseconds>(std::llround(seconds * 1e9));
  return true;
}

bool set(const std::string& key, const std::string& value, Options* out) {
  if (key == "devices") return parse(value, &out->devices) && out->devices <= kMaxDevices;
  if (key == "visible") return parse_visible(value, &out->visible);
  if (key == "name") return (out->name = value).size() > 0;
  if (key == "driver_version") return parse(value, &out->driver_version);
  if (key == "capability") return parse(value, &out->capability);
  if (key == "memory") return parse(value, &out->memory);
  if (key == "granularity") {
    return parse(value, &out->granularity) && out->granularity >= 4 * kKiB &&
           out->granularity <= kGiB && (out->granularity & (out->granularity - 1)) == 0;
  }
  if (key == "peers") return parse(value, &out->peers);
  if (key == "integrated") return parse(value, &out->integrated);
  if (key == "host_numa") return parse(value, &out->host_numa);
  if (key == "posix_fd") return parse(value, &out->posix_fd);
  if (key == "rdma") return parse(value, &out->rdma);
  if (key == "numa_node") return parse_node(value, &out->numa_node);
  if (key == "read_only_register") return parse(value, &out->read_only_register);
  if (key == "clock") return parse_clock(value, &out->clock);
  if (key == "h2d") return parse(value, &out->rates[0]);
  if (key == "d2h") return parse(value, &out->rates[1]);
  if (key == "d2d") return parse(value, &out->rates[2]);
  if (key == "launch") return parse_seconds(value, &out->launch);
  if (key == "copy_start") return parse_seconds(value, &out->copy_start);
  if (key == "mapping_lock") return parse(value, &out->mapping_lock);
  if (key == "context_lock") return parse(value, &out->context_lock);
  if (key == "mapping_beside_copies") return parse(value, &out->mapping_beside_copies);
  if (key == "read") return parse(value, &out->read);
  if (key == "dram") return parse(value, &out->dram);
  if (key == "machine") return (out->machine = value).size() > 0;
  if (key == "content") return parse(value, &out->content);
  if (key == "detector") return parse(value, &out->detector);
  if (key.rfind("cost.", 0) == 0) return parse_cost(key.substr(5), value, out);
  return false;
}

}  // namespace

const char* name_of(Engine engine) noexcept {
  constexpr const char* names[] = {"h2d", "d2h", "d2d"};
  return names[static_cast<int>(engine)];
}

std::vector<int> Options::visible_devices() const {
  std::vector<int> seen;
  if (!visible)
    for (int index = 0; index < devices; ++index) seen.push_back(index);
  for (const int index : visible.value_or(std::vector<int>())) {
    if (index < 0 || index >= devices) break;
    // If a device is listed twice, no device is visible [D CUDA_VISIBLE_DEVICES].
    if (std::find(seen.begin(), seen.end(), index) != seen.end()) return {};
    seen.push_back(index);
  }
  return seen;
}

bool parse_options(const std::string& text, Options* out, std::string* error) {
  Options options;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    line = stripped(line);
    if (line.empty() || line[0] == '#') continue;
    const auto equals = line.find('=');
    if (equals == std::string::npos ||
        !set(stripped(line.substr(0, equals)), stripped(line.substr(equals + 1)), &options)) {
      *error = "invalid option: " + line;
      return false;
    }
  }
  if (options.host_memory() && options.content != 0) {
    *error = "content must be 0 with host_numa or integrated, because the CPU reads all bytes";
    return false;
  }
  *out = options;
  return true;
}

}  // namespace warmserve::simcuda
