// The functions of simcuda.h, by which tests configure the driver and query its observations.
#pragma GCC visibility push(default)
#include "simcuda/simcuda.h"
#pragma GCC visibility pop

#include <sys/prctl.h>

#include <cstdlib>
#include <cstring>

#include "simcuda/simulator.h"

namespace warmserve::simcuda {
namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + "\"";
}

struct Live {
  const char* kind;
  std::size_t count;
};

std::vector<Live> live(const Simulator& sim) {
  std::size_t contexts = 0;
  for (const auto& context : sim.contexts) contexts += !context->destroyed && !context->primary;
  for (const Device& device : sim.devices) contexts += device.retained;
  return {{"contexts", contexts},
          {"granules", sim.memory.count_physical() - sim.memory.count_reservations(true)},
          {"reservations", sim.memory.count_reservations(false)},
          {"mappings", sim.memory.count_mappings() - sim.memory.count_reservations(true)},
          {"allocations", sim.memory.count_reservations(true)},
          {"host_allocations", sim.memory.count_pinned(true)},
          {"registrations", sim.memory.count_pinned(false)},
          {"streams", sim.streams.size()},
          {"events", sim.events.size()},
          {"modules", sim.modules.size()},
          {"graphs", sim.graphs.size()},
          {"graph_execs", sim.execs.size()}};
}

std::string report(const Simulator& sim) {
  std::string out = "{\"violations\": [";
  const char* separator = "";
  for (const Violation& violation : sim.detector.violations()) {
    out += separator + std::string("{\"kind\": ") + quoted(violation.kind) +
           ", \"message\": " + quoted(violation.message) +
           ", \"call\": " + std::to_string(violation.call) + "}";
    separator = ", ";
  }
  out += "], \"dropped\": " + std::to_string(sim.detector.dropped()) + ", \"live\": {";
  separator = "";
  for (const auto& [kind, count] : live(sim)) {
    out += separator + quoted(kind) + ": " + std::to_string(count);
    separator = ", ";
  }
  out += "}, \"calls\": {";
  separator = "";
  for (std::size_t i = 0; i < kFunctions; ++i) {
    if (sim.called[i] == 0) continue;
    out += separator + quoted(name_of(static_cast<Function>(i))) + ": " +
           std::to_string(sim.called[i]);
    separator = ", ";
  }
  char seconds[64];
  std::snprintf(seconds, sizeof seconds, "%.9f", static_cast<double>(sim.now()) * 1e-9);
  out += "}, \"seconds\": " + std::string(seconds) + ", \"copied\": {";
  separator = "";
  for (std::size_t i = 0; i < kEngines; ++i) {
    out +=
        separator + quoted(name_of(static_cast<Engine>(i))) + ": " + std::to_string(sim.copied[i]);
    separator = ", ";
  }
  out += "}, \"lock_waits\": {";
  separator = "";
  for (const auto& [name, lock] :
       {std::pair{"mapping", &sim.mapping_lock}, {"context", &sim.context_lock}}) {
    std::snprintf(seconds, sizeof seconds, "%.9f", static_cast<double>(lock->waited) * 1e-9);
    out += separator + quoted(name) + ": {\"calls\": " + std::to_string(lock->waits) +
           ", \"seconds\": " + seconds + "}";
    separator = ", ";
  }
  return out + "}}";
}

// The locked simulator. Null if the options are invalid, or in a forked child, where the lock may
// be held by a thread that does not exist.
struct Locked {
  Simulator* sim = forked() ? nullptr : simulator();
  Lock lock = sim ? Lock(sim->mutex) : Lock();
};

}  // namespace
}  // namespace warmserve::simcuda

using namespace warmserve::simcuda;

int simcuda_reset(const char* options) {
  Options parsed;
  std::string error;
  if (!parse_options(options ? options : "", &parsed, &error) ||
      !replace_simulator(parsed, &error)) {
    set_error(error);
    return -1;
  }
  return 0;
}

const char* simcuda_error(void) { return last_error(); }

void simcuda_clear_faults(void) {
  const Locked locked;
  if (!locked.sim) return;
  locked.sim->faults.clear();
  locked.sim->called_since_clear = {};
  locked.sim->calls_since_clear = locked.sim->injected = 0;
  locked.sim->last_fault = "";
}

int simcuda_fault(const char* function, unsigned long long first, unsigned long long last,
                  int error) {
  const std::size_t index = function ? function_index(function) : kFunctions;
  if (function && index == kFunctions) {
    set_error("unknown function '" + std::string(function) + "'");
    return -1;
  }
  const Locked locked;
  if (!locked.sim) {
    if (forked()) set_error("the driver belongs to the process that forked this one");
    return -1;
  }
  locked.sim->faults.push_back({index, first, last, static_cast<CUresult>(error)});
  return 0;
}

unsigned long long simcuda_calls(const char* function) {
  const Locked locked;
  if (!locked.sim) return 0;
  if (!function) return locked.sim->calls_since_clear;
  const std::size_t index = function_index(function);
  return index == kFunctions ? 0 : locked.sim->called_since_clear[index];
}

unsigned long long simcuda_injected(void) {
  const Locked locked;
  return locked.sim ? locked.sim->injected : 0;
}

const char* simcuda_last_fault(void) {
  const Locked locked;
  return locked.sim ? locked.sim->last_fault : "";
}

void simcuda_others_hold(unsigned long long bytes) {
  const Locked locked;
  if (locked.sim) locked.sim->memory.others_hold(bytes);
}

void simcuda_break_context(int error) {
  Locked locked;
  if (!locked.sim) return;
  for (const auto& context : locked.sim->contexts)
    if (context->device == 0 && !context->destroyed)
      locked.sim->kill_context(*context, static_cast<CUresult>(error));
  locked.sim->settle(locked.lock);
}

void simcuda_destroy_primary_context(void) {
  Locked locked;
  if (!locked.sim || locked.sim->devices.empty() || !locked.sim->devices[0].primary) return;
  locked.sim->destroy_context(locked.lock, locked.sim->devices[0].primary, true);
}

void simcuda_host_read(unsigned long long bytes) {
  Locked locked;
  if (locked.sim) locked.sim->host_read(locked.lock, bytes);
}

void simcuda_sleep(unsigned long long nanoseconds) {
  {
    Locked locked;
    if (locked.sim && locked.sim->options.concurrent()) {
      const auto slack = std::max(::prctl(PR_GET_TIMERSLACK), 0);
      locked.sim->pay(locked.lock, static_cast<Nanoseconds>(nanoseconds) + slack);
      return;
    }
  }
  std::this_thread::sleep_for(std::chrono::nanoseconds(nanoseconds));
}

double simcuda_now(void) {
  const Locked locked;
  return locked.sim ? static_cast<double>(locked.sim->now()) * 1e-9 : 0;
}

int simcuda_peek(unsigned long long address, void* out, unsigned long long bytes) {
  const Locked locked;
  std::vector<Piece> pieces;
  if (!locked.sim || !locked.sim->memory.walk(address, bytes, &pieces)) return -1;
  auto* at = static_cast<std::byte*>(out);
  const std::uint64_t kept = locked.sim->memory.kept();
  for (const Piece& piece : pieces) {
    const std::uint64_t end = std::min<std::uint64_t>(piece.end, kept);
    const std::uint64_t there = end > piece.begin ? end - piece.begin : 0;
    if (there > 0)
      std::memcpy(at, locked.sim->memory.slot(*piece.mapping->physical, piece.page) + piece.begin,
                  there);
    std::memset(at + there, 0, piece.end - piece.begin - there);
    at += piece.end - piece.begin;
  }
  return 0;
}

char* simcuda_report(void) {
  const Locked locked;
  return ::strdup(locked.sim ? report(*locked.sim).c_str() : "{}");
}

void simcuda_free(char* text) { std::free(text); }

void simcuda_check_leaks(void) {
  const Locked locked;
  if (!locked.sim) return;
  for (const auto& [kind, count] : live(*locked.sim))
    if (count > 0)
      locked.sim->detector.violation("leak", std::to_string(count) + " " + kind, locked.sim->calls);
}
