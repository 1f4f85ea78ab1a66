// A descriptor that becomes readable when something has happened; made when first asked for.
#pragma once

namespace warmserve {

// Under the owner's lock.
class EventFd {
 public:
  EventFd() = default;
  EventFd(const EventFd&) = delete;
  ~EventFd();

  bool made() const noexcept { return descriptor_ >= 0; }
  // Non-blocking; owned by this. Throws general.
  int descriptor();
  void signal() noexcept;  // wait-free
  void clear() noexcept;   // makes it unreadable until the next signal

 private:
  int descriptor_ = -1;
};

}  // namespace warmserve
