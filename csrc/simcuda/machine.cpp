#include "simcuda/machine.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "simcuda/shared.h"

namespace warmserve::simcuda {
namespace {

constexpr std::uint64_t kMagic = 0x7369'6d63'7564'6d01;  // of this layout

// Locks of the open file, one byte each: of the table, and of each slot. A forked child does not
// own them.
constexpr off_t kTableByte = 0, kFirstSlotByte = 1;

struct flock lock_of(off_t byte, short kind) {
  struct flock lock{};
  lock.l_type = kind;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return lock;
}

}  // namespace

class Machine::Guard {
 public:
  explicit Guard(int file) : file_(file) {
    struct flock lock = lock_of(kTableByte, F_WRLCK);
    while (::fcntl(file_, F_OFD_SETLKW, &lock) != 0 && errno == EINTR) {
    }
  }
  ~Guard() {
    struct flock lock = lock_of(kTableByte, F_UNLCK);
    ::fcntl(file_, F_OFD_SETLK, &lock);
  }
  Guard(const Guard&) = delete;

 private:
  const int file_;
};

bool Machine::join(const Options& options, std::unique_ptr<Machine>* out, std::string* error) {
  out->reset();
  if (options.machine.empty()) return true;
  const std::string of = " of the machine's file " + options.machine;
  const int file = ::open(options.machine.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0) {
    *error = "open" + of + ": " + std::generic_category().message(errno);
    return false;
  }
  void* memory = MAP_FAILED;
  {
    const Guard guard(file);
    struct stat info{};
    if (::fstat(file, &info) == 0 && (static_cast<std::size_t>(info.st_size) == sizeof(Table) ||
                                      (info.st_size == 0 && ::ftruncate(file, sizeof(Table)) == 0)))
      memory = ::mmap(nullptr, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    else
      errno = EINVAL;
  }
  if (memory == MAP_FAILED) {
    *error = "mmap" + of + ": " + std::generic_category().message(errno);
    ::close(file);
    return false;
  }
  ::madvise(memory, sizeof(Table), MADV_DONTFORK);
  std::unique_ptr<Machine> machine(new Machine(file, static_cast<Table*>(memory)));
  const Guard guard(file);
  if (!machine->suits(options)) {
    *error = options.machine + " is the file of a machine whose devices are different";
    return false;
  }
  if (!machine->enter()) {
    *error = options.machine + " has no slot for another process; it has " +
             std::to_string(kMostProcesses);
    return false;
  }
  *out = std::move(machine);
  return true;
}

Machine::~Machine() {
  ::munmap(&table_, sizeof(Table));
  ::close(file_);  // releases the slot
}

void Machine::close_in_child() const { ::close(file_); }

// The lock is held.
bool Machine::suits(const Options& options) {
  const auto devices = static_cast<std::uint64_t>(options.devices);
  if (table_.magic == 0) {
    table_.memory = options.memory;
    table_.granularity = options.granularity;
    table_.kept = options.kept();
    table_.devices = devices;
    table_.one_memory = options.integrated;
    table_.magic = kMagic;
  }
  return table_.magic == kMagic && table_.memory == options.memory &&
         table_.granularity == options.granularity && table_.kept == options.kept() &&
         table_.devices == devices && table_.one_memory == options.integrated;
}

// Takes a slot that no living process owns, and forgets what its last owner held. The lock is held.
bool Machine::enter() {
  for (slot_ = 0; slot_ < kMostProcesses; ++slot_) {
    struct flock lock = lock_of(kFirstSlotByte + static_cast<off_t>(slot_), F_WRLCK);
    if (::fcntl(file_, F_OFD_SETLK, &lock) != 0) continue;
    for (std::uint64_t i = 0; i < table_.shared; ++i) table_.entries[i].holders &= ~(1ull << slot_);
    table_.slots[slot_] = {::getpid(), {}};
    return true;
  }
  return false;
}

// Returns the slots of living processes, a bit for each. The lock is held.
std::uint64_t Machine::living() const {
  std::uint64_t living = 1ull << slot_;
  for (std::size_t slot = 0; slot < kMostProcesses; ++slot) {
    if (slot == slot_ || table_.slots[slot].process == 0) continue;
    struct flock lock = lock_of(kFirstSlotByte + static_cast<off_t>(slot), F_WRLCK);
    if (::fcntl(file_, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK) living |= 1ull << slot;
  }
  return living;
}

// The lock is held.
std::uint64_t Machine::sum(std::size_t pool) const {
  const std::uint64_t living = this->living();
  std::uint64_t bytes = 0;
  for (std::size_t slot = 0; slot < kMostProcesses; ++slot)
    if (living >> slot & 1) bytes += table_.slots[slot].taken[pool];
  for (std::uint64_t i = 0; i < table_.shared; ++i) {
    const Shared& shared = table_.entries[i];
    if (shared.pool == pool && (shared.holders & living)) bytes += shared.bytes;
  }
  return bytes;
}

std::uint64_t Machine::used(std::size_t pool) const {
  const Guard guard(file_);
  return sum(pool);
}

bool Machine::take(std::size_t pool, std::uint64_t bytes, std::uint64_t most) {
  const Guard guard(file_);
  const std::uint64_t used = sum(pool);
  if (used > most || bytes > most - used) return false;
  table_.slots[slot_].taken[pool] += bytes;
  return true;
}

void Machine::give_back(std::size_t pool, std::uint64_t bytes) {
  const Guard guard(file_);
  table_.slots[slot_].taken[pool] -= bytes;
}

bool Machine::hold(SharedFile& file, std::size_t pool, bool taken) {
  const Guard guard(file_);
  const std::uint64_t bytes = file.facts().bytes;
  std::uint64_t at = file.entry();
  if (at >= table_.shared || table_.entries[at].identity != file.identity()) {
    // The allocation is new, or its entry was reused while no process held it.
    const std::uint64_t living = this->living();
    for (at = 0; at < table_.shared && (table_.entries[at].holders & living); ++at) {
    }
    if (at == kMostShared) return false;
    if (at == table_.shared) ++table_.shared;
    table_.entries[at] = {file.identity(), bytes, pool, 0};
    file.entry() = static_cast<std::uint32_t>(at);
  }
  table_.entries[at].holders |= 1ull << slot_;
  if (taken) table_.slots[slot_].taken[pool] -= bytes;
  return true;
}

void Machine::let_go(SharedFile& file) {
  const Guard guard(file_);
  table_.entries[file.entry()].holders &= ~(1ull << slot_);
}

}  // namespace warmserve::simcuda
