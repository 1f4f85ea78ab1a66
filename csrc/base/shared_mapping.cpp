#include "base/shared_mapping.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <string>

#include "base/error.h"
#include "base/os_failure.h"

namespace warmserve {

SharedMapping::SharedMapping(int descriptor, std::uint64_t bytes, const char* what)
    : bytes_(bytes) {
  const std::string name = what;
  struct stat status{};
  if (::fstat(descriptor, &status) != 0)
    throw Error(ErrorKind::general, os_failure("fstat of " + name, errno));
  if (static_cast<std::uint64_t>(status.st_size) < bytes)
    throw Error(ErrorKind::general, name + " has " + format_bytes(status.st_size) + ", but needs " +
                                        format_bytes(bytes));
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (mapped == MAP_FAILED)
    throw Error(ErrorKind::general, os_failure("mmap of " + name, errno, OsLimit::addresses));
  ::madvise(mapped, bytes, MADV_DONTFORK);
  data_ = mapped;
}

SharedMapping::~SharedMapping() { ::munmap(data_, bytes_); }

}  // namespace warmserve
