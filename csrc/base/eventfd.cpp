#include "base/eventfd.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.h"
#include "base/os_failure.h"

namespace warmserve {

EventFd::~EventFd() {
  if (made()) ::close(descriptor_);
}

int EventFd::descriptor() {
  if (!made()) descriptor_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (!made()) throw Error(ErrorKind::general, os_failure("eventfd", errno, OsLimit::descriptors));
  return descriptor_;
}

void EventFd::signal() noexcept {
  if (!made()) return;
  // The write fails only if the counter is at its limit, and then the descriptor is readable.
  [[maybe_unused]] const int ignored = ::eventfd_write(descriptor_, 1);
}

void EventFd::clear() noexcept {
  if (!made()) return;
  eventfd_t count = 0;
  [[maybe_unused]] const int ignored = ::eventfd_read(descriptor_, &count);
}

}  // namespace warmserve
