// The other threads of the process: whether all of them sleep.
#pragma once

#include <sys/types.h>
#include <time.h>

#include <cstdint>
#include <span>
#include <vector>

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
  struct Thread {
    pid_t id;
    int state;        // a descriptor of the thread's file "stat"
    clockid_t clock;  // of its processor time
  };

  bool refresh();
  void forget();

  std::vector<Thread> threads_;
  std::uint64_t links_ = 0;  // hard links of /proc/self/task: grows with the number of threads
};

pid_t this_thread_id() noexcept;

}  // namespace warmserve::simcuda
