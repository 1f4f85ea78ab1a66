// The process's simulator, and its handling of fork and exit.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "simcuda/simulator.h"

namespace warmserve::simcuda {
namespace {

// These variables have no destructors, because calls are possible during the process's exit, after
// destructors have run.
std::atomic<Simulator*> current{nullptr};
std::atomic<bool> is_forked{false}, is_exiting{false}, is_watched{false};
std::atomic<std::uint64_t> next_thread{1}, handle_numbers{0x5700'0000'0000 / 16};
constinit thread_local ThreadState thread_state{};

std::mutex& begin_mutex() {  // held while a thread makes or replaces the simulator
  static auto* const mutex = new std::mutex;
  return *mutex;
}

std::string& error_text() {
  static auto* const text = new std::string;
  return *text;
}

// Returns the content of "simcuda.conf" beside the path by which this library was opened.
std::string configuration() {
  Dl_info info{};
  if (!::dladdr(reinterpret_cast<const void*>(&simulator), &info) || !info.dli_fname) return "";
  const std::string path = info.dli_fname;
  std::ifstream file(path.substr(0, path.rfind('/') + 1) + "simcuda.conf");
  std::ostringstream text;
  if (file) text << file.rdbuf();
  return text.str();
}

void end_of_process() {
  if (is_forked) return;
  is_exiting = true;
  // Stop the threads, because they may be reading memory that the program is about to free. A host
  // function that does not return within a second is abandoned.
  if (Simulator* const now = current.load(); now && !thread_state.in_callback)
    now->stop(std::chrono::seconds(1));
}

}  // namespace

std::uint64_t new_handle() noexcept { return handle_numbers.fetch_add(1) * 16; }

ThreadState& this_thread() noexcept {
  if (thread_state.id == 0) thread_state.id = next_thread.fetch_add(1);
  return thread_state;
}

Simulator* simulator() noexcept {
  if (Simulator* const now = current.load(std::memory_order_acquire)) return now;
  const std::lock_guard guard(begin_mutex());
  if (Simulator* const now = current.load()) return now;
  Options options;
  std::string error;
  if (!parse_options(configuration(), &options, &error)) {
    error_text() = "simcuda.conf: " + error;
    return nullptr;
  }
  std::unique_ptr<Machine> machine;
  if (!Machine::join(options, &machine, &error)) {
    error_text() = "simcuda.conf: " + error;
    return nullptr;
  }
  current = new Simulator(options, std::move(machine));
  return current;
}

bool replace_simulator(const Options& options, std::string* error) {
  const std::lock_guard guard(begin_mutex());
  if (is_exiting) {
    *error = "the process is exiting";
    return false;
  }
  std::unique_ptr<Machine> machine;
  if (!Machine::join(options, &machine, error)) return false;
  Simulator* const old = current.load();
  // In a child of fork() the old simulator has no threads, and its lock may be held for ever.
  if (old && !is_forked) {
    old->stop(std::chrono::hours(1));
    current = nullptr;
    delete old;
  }
  is_forked = false;
  current = new Simulator(options, std::move(machine));
  return true;
}

bool forked() noexcept { return is_forked.load(std::memory_order_relaxed); }
bool exiting() noexcept { return is_exiting.load(std::memory_order_relaxed); }

void watch_process_end() noexcept {
  if (is_watched.exchange(true)) return;
  ::pthread_atfork(nullptr, nullptr, [] {
    if (Simulator* const now = current.load(); now && !is_forked) now->memory.close_in_child();
    is_forked = true;
  });
  std::atexit(end_of_process);
  // Keep the library loaded after dlclose(), because threads run its code until the process ends.
  Dl_info info{};
  if (::dladdr(reinterpret_cast<const void*>(&simulator), &info) && info.dli_fname)
    ::dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}

void set_error(std::string text) {
  const std::lock_guard guard(begin_mutex());
  error_text() = std::move(text);
}

const char* last_error() noexcept { return error_text().c_str(); }

}  // namespace warmserve::simcuda
