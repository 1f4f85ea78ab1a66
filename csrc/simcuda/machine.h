// The memory that all processes of a simulated machine hold, in a file that they share.
//
// A process has a slot in the file's table, which it owns as long as it holds the lock of one byte
// of the file. The kernel releases that lock when the process dies, so nothing that a dead process
// held is counted, and no number of a process is reused unnoticed.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "simcuda/options.h"

namespace warmserve::simcuda {

class SharedFile;

// Its methods take the lock of the table, for some microseconds.
class Machine {
 public:
  // One for the memory of each device, and one for the memory of the host.
  static constexpr std::size_t kPools = kMaxDevices + 1;

  // Joins the machine that the options name, and makes its file if there is none. Sets `out` to
  // null if they name no machine. Returns false and sets `error` if the file is of a machine with
  // other devices, or cannot be used.
  static bool join(const Options& options, std::unique_ptr<Machine>* out, std::string* error);
  ~Machine();
  Machine(const Machine&) = delete;

  // Returns the bytes of a pool that all processes hold. A shared allocation counts once.
  std::uint64_t used(std::size_t pool) const;
  // Takes bytes for an allocation of this process. Returns false if more than `most` bytes would
  // then be used.
  bool take(std::size_t pool, std::uint64_t bytes, std::uint64_t most);
  void give_back(std::size_t pool, std::uint64_t bytes);
  // Makes this process a holder of a shared allocation. `taken`: it has taken the bytes by take().
  // Returns false if the table has no room.
  bool hold(SharedFile& file, std::size_t pool, bool taken);
  void let_go(SharedFile& file);
  // For a forked child, which would otherwise keep its parent's slot after the parent's death.
  void close_in_child() const;

 private:
  static constexpr std::size_t kMostProcesses = 64, kMostShared = 1 << 16;
  struct Slot {
    std::int64_t process;  // for people who read the file
    std::array<std::uint64_t, kPools> taken;
  };
  struct Shared {
    std::uint64_t identity, bytes, pool;
    std::uint64_t holders;  // a bit per slot
  };
  struct Table {
    std::uint64_t magic, memory, granularity, kept, devices, one_memory;
    std::array<Slot, kMostProcesses> slots;
    std::uint64_t shared;  // entries in use at the beginning of `entries`
    std::array<Shared, kMostShared> entries;
  };
  class Guard;

  Machine(int file, Table* table) : file_(file), table_(*table) {}
  bool suits(const Options& options);
  bool enter();
  std::uint64_t living() const;
  std::uint64_t sum(std::size_t pool) const;

  const int file_;
  Table& table_;
  std::size_t slot_ = 0;
};

}  // namespace warmserve::simcuda
