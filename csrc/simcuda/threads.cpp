// The processor time of every thread is read, then its state, then its time again. If no time has
// changed, no thread ran between the two rounds of times, so none woke another one. If all states
// say asleep, all threads were therefore asleep together. Only a timer or another process can wake
// one then.
#include "simcuda/threads.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

namespace warmserve::simcuda {
namespace {

constexpr const char* kTasks = "/proc/self/task";
constexpr std::int64_t kEnded = -1;

std::uint64_t links() {
  struct stat status{};
  return ::stat(kTasks, &status) == 0 ? status.st_nlink : 0;
}

// Returns the clock of a thread's processor time, as pthread_getcpuclockid does for a pthread_t.
clockid_t clock_of(pid_t thread) {
  constexpr unsigned kOfThread = 4, kScheduled = 2;
  return static_cast<clockid_t>(~static_cast<unsigned>(thread) << 3 | kOfThread | kScheduled);
}

std::int64_t time_on(clockid_t clock) {
  timespec time{};
  if (::clock_gettime(clock, &time) != 0) return kEnded;
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

// Returns whether the thread is neither running nor ready to run, nor in an operation that the
// system will end by itself, such as reading a disk.
bool sleeps(int state) {
  char text[256];
  const ssize_t got = ::pread(state, text, sizeof text - 1, 0);
  text[std::max<ssize_t>(got, 0)] = 0;
  const char* const end = std::strrchr(text, ')');  // of the name, which may have parentheses
  return end && end[1] == ' ' && std::strchr("SItTZX", end[2]);
}

}  // namespace

pid_t this_thread_id() noexcept {
  thread_local const pid_t id = ::gettid();
  return id;
}

Threads::~Threads() { forget(); }

void Threads::forget() {
  for (const Thread& thread : threads_) ::close(thread.state);
  threads_.clear();
  links_ = 0;
}

// Opens the files of all threads. Returns false if the threads changed meanwhile.
bool Threads::refresh() {
  forget();
  const std::uint64_t before = links();
  DIR* const folder = ::opendir(kTasks);
  if (!folder) return false;
  bool complete = true;
  while (const dirent* const entry = ::readdir(folder)) {
    if (entry->d_name[0] == '.') continue;
    const std::string path = std::string(kTasks) + "/" + entry->d_name + "/stat";
    const auto id = static_cast<pid_t>(std::atol(entry->d_name));
    threads_.push_back({id, ::open(path.c_str(), O_RDONLY | O_CLOEXEC), clock_of(id)});
    complete = complete && threads_.back().state >= 0;
  }
  ::closedir(folder);
  links_ = before;
  return complete && links() == before;
}

bool Threads::all_asleep(std::span<const pid_t> asleep) {
  if ((links_ == 0 || links() != links_) && !refresh()) {
    forget();
    return false;
  }
  struct Examined {
    const Thread* thread;
    std::int64_t time;
  };
  std::vector<Examined> examined;
  for (const Thread& thread : threads_) {
    if (thread.id == this_thread_id() ||
        std::find(asleep.begin(), asleep.end(), thread.id) != asleep.end())
      continue;
    examined.push_back({&thread, time_on(thread.clock)});
    if (examined.back().time == kEnded) {
      forget();
      return false;
    }
  }
  for (const Examined& each : examined)
    if (!sleeps(each.thread->state)) return false;
  for (const Examined& each : examined)
    if (time_on(each.thread->clock) != each.time) return false;
  return links() == links_;
}

}  // namespace warmserve::simcuda
