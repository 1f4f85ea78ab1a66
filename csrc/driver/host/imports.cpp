#include "driver/host/imports.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "base/os_failure.h"

namespace warmserve {

HostImports::~HostImports() {
  for (const auto& [inode, file] : files_) ::close(file.descriptor);
}

Status HostImports::add(const SharedGranule& shared, std::uint64_t bytes, std::uint64_t granularity,
                        int* descriptor, std::string* why) {
  struct stat info{};
  if (::fstat(shared.descriptor, &info) != 0) {
    *why = os_failure("fstat of the descriptor of a granule to import", errno);
    return Status::invalid;
  }
  if (!S_ISREG(info.st_mode) || (::fcntl(shared.descriptor, F_GETFL) & O_ACCMODE) != O_RDONLY) {
    *why = "the descriptor of a granule to import must be of a regular file, opened read-only";
    return Status::invalid;
  }
  const auto size = static_cast<std::uint64_t>(info.st_size);
  if (bytes == 0 || bytes % granularity || shared.offset % granularity || bytes > size ||
      shared.offset > size - bytes) {
    *why = "the file of " + format_bytes(size) + " has no granule of " + format_bytes(bytes) +
           " at offset " + std::to_string(shared.offset);
    return Status::invalid;
  }
  File& file = files_[{info.st_dev, info.st_ino}];
  if (file.users == 0) file.descriptor = ::fcntl(shared.descriptor, F_DUPFD_CLOEXEC, 0);
  if (file.descriptor < 0) {
    *why = os_failure("fcntl(F_DUPFD_CLOEXEC) of the descriptor of a granule to import", errno,
                      OsLimit::descriptors);
    files_.erase({info.st_dev, info.st_ino});
    return Status::failed;
  }
  ++file.users;
  *descriptor = file.descriptor;
  return Status::ok;
}

void HostImports::remove(int descriptor) noexcept {
  const auto found = std::find_if(files_.begin(), files_.end(), [descriptor](const auto& entry) {
    return entry.second.descriptor == descriptor;
  });
  if (--found->second.users > 0) return;
  ::close(descriptor);
  files_.erase(found);
}

}  // namespace warmserve
