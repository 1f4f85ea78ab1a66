// A file that is mapped for reading and writing, and shared with other processes.
#pragma once

#include <cstdint>

namespace warmserve {

// Not inherited by a forked child.
class SharedMapping {
 public:
  // Maps the first `bytes` of the file. The descriptor stays the caller's. `what` names the file in
  // messages. Throws general if the file is shorter or cannot be mapped.
  SharedMapping(int descriptor, std::uint64_t bytes, const char* what);
  ~SharedMapping();
  SharedMapping(const SharedMapping&) = delete;

  void* data() const noexcept { return data_; }

 private:
  void* data_ = nullptr;
  const std::uint64_t bytes_;
};

}  // namespace warmserve
