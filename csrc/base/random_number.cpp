#include "base/random_number.h"

#include <sys/random.h>

#include <cerrno>

#include "base/error.h"
#include "base/os_failure.h"

namespace warmserve {

std::uint64_t random_number() {
  std::uint64_t number = 0;
  while (number == 0)
    if (::getrandom(&number, sizeof number, 0) != sizeof number)
      throw Error(ErrorKind::general, os_failure("getrandom", errno));
  return number;
}

}  // namespace warmserve
