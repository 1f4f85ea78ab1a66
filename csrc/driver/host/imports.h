// The files of granules that other processes have exported.
#pragma once

#include <sys/types.h>

#include <map>
#include <string>
#include <utility>

#include "driver/driver.h"

namespace warmserve {

// Keeps one descriptor per file, as long as a granule of the file is used. Not thread-safe.
class HostImports {
 public:
  HostImports() = default;
  ~HostImports();
  HostImports(const HostImports&) = delete;

  // Adds a user of the file. Checks that the file can contain such a granule, and sets `descriptor`
  // to one that maps it and belongs to this object. On failure sets `why`.
  Status add(const SharedGranule& shared, std::uint64_t bytes, std::uint64_t granularity,
             int* descriptor, std::string* why);
  // Removes a user of the file, and closes the descriptor after the last one.
  void remove(int descriptor) noexcept;

 private:
  struct File {
    int descriptor = -1;
    std::uint64_t users = 0;
  };
  std::map<std::pair<dev_t, ino_t>, File> files_;
};

}  // namespace warmserve
