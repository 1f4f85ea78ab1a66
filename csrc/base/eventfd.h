// A descriptor that becomes readable when something has happened. It is created on first use.
#pragma once

namespace warmserve {

// The owner's lock guards all calls.
class EventFd {
 public:
  EventFd() = default;
  EventFd(const EventFd&) = delete;
  ~EventFd();

  bool made() const noexcept { return descriptor_ >= 0; }
  // Returns the descriptor, which is non-blocking and owned by this object. Throws general.
  int descriptor();
  void signal() noexcept;  // wait-free
  void clear() noexcept;   // makes the descriptor unreadable until the next signal

 private:
  int descriptor_ = -1;
};

}  // namespace warmserve
