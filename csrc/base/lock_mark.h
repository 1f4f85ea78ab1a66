// A mark on each thread that holds a lock under which no driver call may be made. The runtime's
// lock sets it; StrictDriver checks it.
#pragma once

namespace warmserve {

class LockMark {
 public:
  static void set() noexcept { ++held_; }
  static void clear() noexcept { --held_; }
  static bool held() noexcept { return held_ > 0; }

 private:
  static inline thread_local constinit int held_ = 0;
};

}  // namespace warmserve
