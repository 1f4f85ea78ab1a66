// The names of statuses and primitives.
#include "driver/driver.h"

namespace warmserve {

const char* to_string(Status status) noexcept {
  switch (status) {
    case Status::ok: return "ok";
    case Status::out_of_memory: return "out of memory";
    case Status::out_of_mappings: return "too many mappings (vm.max_map_count)";
    case Status::out_of_addresses: return "out of addresses";
    case Status::invalid: return "invalid call";
    case Status::not_ready: return "not ready";
    case Status::device_lost: return "device lost";
    case Status::failed: return "failed";
  }
  return "unknown";
}

const char* to_string(Primitive primitive) noexcept {
  static constexpr const char* kNames[] = {
#define X(name) #name,
      WARMSERVE_PRIMITIVES(X)
#undef X
  };
  return kNames[static_cast<int>(primitive)];
}

}  // namespace warmserve
