// A thread was asleep throughout an interval if it was asleep at both ends and did not run in
// between. Every thread is examined twice: first all of them, then all of them again. If each was
// asleep throughout its own interval, all of them were asleep between the two rounds. Nothing but
// a timer or another process can then wake one.
#include "simcuda/threads.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace warmserve::simcuda {
namespace {

constexpr const char* kTasks = "/proc/self/task";

std::uint64_t links() {
  struct stat status{};
  return ::stat(kTasks, &status) == 0 ? status.st_nlink : 0;
}

// Reads the start of a file of /proc. Returns false if its thread has ended.
template <std::size_t N>
bool read_start(int descriptor, char (&text)[N]) {
  const ssize_t got = ::pread(descriptor, text, N - 1, 0);
  text[std::max<ssize_t>(got, 0)] = 0;
  return got > 0;
}

// Returns whether the thread is neither running nor ready to run, nor in an operation that the
// system will end by itself, such as reading a disk.
bool sleeps(int state) {
  char text[512];
  if (!read_start(state, text)) return false;
  const char* const end = std::strrchr(text, ')');  // of the name, which may have parentheses
  return end && end[1] == ' ' && std::strchr("SItTZX", end[2]);
}

// Returns how often the thread was given a processor, or 0.
std::uint64_t times_run(int runs) {
  char text[128];
  if (!read_start(runs, text)) return 0;
  const char* const last = std::strrchr(text, ' ');
  return last ? std::strtoull(last, nullptr, 10) : 0;
}

}  // namespace

pid_t this_thread_id() noexcept {
  thread_local const pid_t id = ::gettid();
  return id;
}

Threads::~Threads() { forget(); }

void Threads::forget() {
  for (const auto& [id, files] : files_) {
    ::close(files.state);
    ::close(files.runs);
  }
  files_.clear();
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
    const std::string path = std::string(kTasks) + "/" + entry->d_name;
    const Files files{::open((path + "/stat").c_str(), O_RDONLY | O_CLOEXEC),
                      ::open((path + "/schedstat").c_str(), O_RDONLY | O_CLOEXEC)};
    files_[static_cast<pid_t>(std::atol(entry->d_name))] = files;
    complete = complete && files.state >= 0 && files.runs >= 0;
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
    Files files;
    std::uint64_t runs;
  };
  std::vector<Examined> all;
  for (const auto& [id, files] : files_) {
    if (id == this_thread_id() || std::find(asleep.begin(), asleep.end(), id) != asleep.end())
      continue;
    const std::uint64_t runs = times_run(files.runs);
    if (runs == 0) {  // it has ended
      forget();
      return false;
    }
    if (!sleeps(files.state)) return false;
    all.push_back({files, runs});
  }
  for (const Examined& each : all)
    if (!sleeps(each.files.state) || times_run(each.files.runs) != each.runs) return false;
  return links() == links_;
}

}  // namespace warmserve::simcuda
