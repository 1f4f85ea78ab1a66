// The other threads of the process: whether all of them sleep.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <span>

namespace warmserve::simcuda {

class Threads {
 public:
  Threads() = default;
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  // Returns whether there was an instant during this call at which every thread of the process was
  // asleep, except the caller. The threads in `asleep` are not examined. May return false although
  // there was such an instant. Not thread-safe.
  bool all_asleep(std::span<const pid_t> asleep);

 private:
  struct Files {
    int state, runs;  // descriptors of the thread's stat and schedstat
  };

  bool refresh();
  void forget();
  std::map<pid_t, Files> files_;
  std::uint64_t links_ = 0;  // hard links of /proc/self/task: grows with the number of threads
};

pid_t this_thread_id() noexcept;

}  // namespace warmserve::simcuda
