#include "ticket.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace warmserve {
namespace {

void signal(int eventfd) {
  // Cannot block: the counter is far from its limit. A failure leaves nothing to do about it.
  [[maybe_unused]] const int ignored = ::eventfd_write(eventfd, 1);
}

}  // namespace

Ticket::~Ticket() {
  if (eventfd_ >= 0) ::close(eventfd_);
}

void Ticket::finish(Books& books, const Lock&, std::exception_ptr why) {
  if (done) return;
  done = true;
  error = why;
  if (eventfd_ >= 0) signal(eventfd_);
  books.wake();
}

int Ticket::fileno(const Lock&) {
  if (eventfd_ >= 0) return eventfd_;
  eventfd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (eventfd_ < 0)
    throw Error(ErrorKind::general, "eventfd: " + std::generic_category().message(errno));
  if (done) signal(eventfd_);
  return eventfd_;
}

}  // namespace warmserve
