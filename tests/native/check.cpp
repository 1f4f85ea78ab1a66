#include "check.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

// ThreadSanitizer does not see the reference counts that the C++ library keeps of exceptions.
// Therefore the destruction of an exception looks like a race with its earlier users.
extern "C" const char* __tsan_default_suppressions() { return "race:warmserve::Error::kind"; }

namespace check {
namespace {

constexpr unsigned kSecondsPerTest = 300;  // a longer test is killed

struct Named {
  std::string name;
  void (*body)();
};
std::vector<Named>& tests() {
  static std::vector<Named> all;
  return all;
}

const char* simulator_path = nullptr;
bool is_thorough = false;

}  // namespace

const char* simulator() { return simulator_path; }

bool thorough() { return is_thorough; }

Test::Test(const char* name, void (*body)()) { tests().push_back({name, body}); }

void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "\n%s:%d: failed: %s\n", file, line, what.c_str());
  std::_Exit(1);
}

}  // namespace check

int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  std::vector<std::string> chosen(argv + 1, argv + argc);
  if (!chosen.empty() && chosen[0] == "--thorough") {
    check::is_thorough = true;
    chosen.erase(chosen.begin());
  }
  if (chosen.size() >= 2 && chosen[0] == "--simcuda") {
    check::simulator_path = argv[argc - chosen.size() + 1];
    std::printf("on a simulated CUDA device:\n");
    chosen.erase(chosen.begin(), chosen.begin() + 2);
  }
  int ran = 0;
  for (const auto& [name, body] : check::tests()) {
    if (!chosen.empty() && std::find(chosen.begin(), chosen.end(), name) == chosen.end()) continue;
    ++ran;
    std::printf("%s ... ", name.c_str());
    std::fflush(stdout);
    ::alarm(check::kSecondsPerTest);
    const auto start = Clock::now();
    try {
      body();
    } catch (const std::exception& error) {
      check::fail(argv[0], 0, name + " threw: " + error.what());
    }
    const std::chrono::duration<double> took = Clock::now() - start;
    std::printf("ok (%.1f s)\n", took.count());
  }
  if (ran == 0) check::fail(argv[0], 0, "no test has the given name");
}
