// The memory of an allocation that other processes can import: a file without a name. It lives
// until the last process has neither a descriptor nor a mapping of it.
//
// The file has a header, then the record of the bytes that were written, then the contents. Its
// size is sealed, so that no other process can take pages away.
#pragma once

#include <pthread.h>

#include <memory>
#include <vector>

#include "simcuda/functions.h"

namespace warmserve::simcuda {

// Bytes [begin, end) of a page.
struct Range {
  std::uint32_t begin, end;
};

// The facts of an allocation that a process needs to import it.
struct SharedFacts {
  std::uint64_t bytes, granularity;
  std::uint64_t kept;  // leading bytes of each granule whose content is kept
  int device;          // index among the devices of the machine
  bool host;           // memory of the host
  CUmemAllocationProp prop;
};

class SharedFile {
 public:
  // Returns null if the system refuses a file or a mapping of it.
  static std::unique_ptr<SharedFile> make(const SharedFacts& facts);
  // Opens a file that another process has made. The descriptor stays the caller's. Returns null if
  // it is of no such file, or if the system refuses.
  static std::unique_ptr<SharedFile> open(int descriptor);
  ~SharedFile();
  SharedFile(const SharedFile&) = delete;

  const SharedFacts& facts() const { return header().facts; }
  // A number that no other allocation has.
  std::uint64_t identity() const { return header().identity; }
  // Index of the allocation in the machine's table (machine.h). Guarded by the lock of the table.
  std::uint32_t& entry() { return header().entry; }
  int descriptor() const { return descriptor_; }
  std::uint64_t contents_at() const { return contents_at_; }  // offset in the file
  std::byte* contents() const { return memory_ + contents_at_; }

  // The written ranges of a page: ascending, neither overlapping nor adjacent. If there are more
  // than fit, the file counts small gaps between them as written. These calls take a lock of the
  // file. If a process died with it, the whole allocation counts as written.
  std::vector<Range> written(std::uint64_t page);
  template <class Change>
  void change_written(std::uint64_t page, Change change) {
    const Guard guard(*this);
    std::vector<Range> ranges = load(page);
    change(ranges);
    store(page, std::move(ranges));
  }

 private:
  struct Header {
    std::uint64_t magic, identity;
    SharedFacts facts;
    std::uint32_t entry;
    pthread_mutex_t mutex;  // guards the written ranges
  };
  static constexpr std::size_t kMostRanges = 511;
  struct Written {
    std::uint64_t count;
    Range ranges[kMostRanges];
  };
  class Guard {
   public:
    explicit Guard(SharedFile& file);
    ~Guard();
    Guard(const Guard&) = delete;

   private:
    pthread_mutex_t& mutex_;
  };

  SharedFile(int descriptor, std::byte* memory, const SharedFacts& facts);
  static std::uint64_t contents_at(const SharedFacts& facts);
  static std::uint64_t bytes_of(const SharedFacts& facts);
  Header& header() const { return *reinterpret_cast<Header*>(memory_); }
  Written& record(std::uint64_t page) const;
  std::vector<Range> load(std::uint64_t page) const;
  void store(std::uint64_t page, std::vector<Range> ranges);

  const int descriptor_;
  std::byte* const memory_;
  const std::uint64_t contents_at_, bytes_;
};

}  // namespace warmserve::simcuda
