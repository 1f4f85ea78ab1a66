// The simulated driver's allocations in several processes: what is recorded beside their contents,
// and what happens if a process dies.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

#include "simcuda/machine.h"
#include "simcuda/shared.h"
#include "simcuda_fixtures.h"

using namespace simcuda_test;

namespace {

SharedFacts facts(std::uint64_t granules = 2) {
  return {granules * kGranule, kGranule, kGranule, 0, false, prop()};
}

// Runs `work` in a child process, which then ends as if it was killed.
template <class Work>
void in_child(Work work) {
  const pid_t child = ::fork();
  CHECK(child >= 0);
  if (child == 0) {
    work();
    ::_exit(0);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

void add(SharedFile& file, std::uint64_t page, Range range) {
  file.change_written(page, [=](std::vector<Range>& ranges) { ranges.push_back(range); });
}

struct MachineFile {
  MachineFile() { options.machine = path; }
  ~MachineFile() { std::filesystem::remove(path); }
  std::unique_ptr<Machine> join() const {
    std::unique_ptr<Machine> machine;
    std::string error;
    CHECK(Machine::join(options, &machine, &error));
    return machine;
  }

  const std::string path =
      std::filesystem::temp_directory_path() / ("simcuda-machine-" + std::to_string(::getpid()));
  Options options;
};

}  // namespace

TEST(another_process_sees_what_was_written) {
  const auto file = SharedFile::make(facts());
  CHECK(file);
  const std::uint64_t identity = file->identity();
  in_child([&] {  // it does not inherit the mapping
    const auto same = SharedFile::open(file->descriptor());
    CHECK(same && same->identity() == identity && same->facts().bytes == 2 * kGranule);
    std::memset(same->contents() + kGranule, 7, 100);
    add(*same, 1, {0, 100});
  });
  CHECK(file->written(0).empty());
  CHECK(file->written(1).size() == 1 && file->written(1)[0].end == 100);
  CHECK(file->contents()[kGranule + 99] == std::byte{7});
}

TEST(small_gaps_count_as_written_if_there_are_too_many) {
  const auto file = SharedFile::make(facts());
  std::uint32_t at = 0;
  for (std::uint32_t i = 0; i < 600; ++i) {
    add(*file, 0, {at, at + 10});
    at += i % 2 ? 1000 : 20;  // gaps of 990 and of 10 bytes
  }
  const std::vector<Range> ranges = file->written(0);
  CHECK(ranges.size() == 511);
  CHECK(ranges.front().begin == 0 && ranges.front().end == 30);
  for (std::size_t i = 1; i < ranges.size(); ++i) CHECK(ranges[i - 1].end < ranges[i].begin);
}

TEST(all_counts_as_written_after_a_death_during_a_change) {
  const auto file = SharedFile::make(facts());
  in_child([&] {
    const auto same = SharedFile::open(file->descriptor());
    same->change_written(0, [](std::vector<Range>&) { ::_exit(0); });
  });
  for (const std::uint64_t page : {0, 1}) {
    CHECK(file->written(page).size() == 1);
    CHECK(file->written(page)[0].begin == 0 && file->written(page)[0].end == kGranule);
  }
  add(*file, 0, {0, 1});  // the lock works again
}

TEST(other_files_are_not_imported) {
  CHECK(!SharedFile::open(-1));
  const int foreign = ::memfd_create("foreign", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(::ftruncate(foreign, 2 * kGranule) == 0);
  CHECK(!SharedFile::open(foreign));
  const auto file = SharedFile::make(facts());
  CHECK(::ftruncate(file->descriptor(), 4096) != 0);  // no process can take its pages away
  std::vector<char> header(4096);
  CHECK(::pread(file->descriptor(), header.data(), header.size(), 0) == 4096);
  CHECK(::pwrite(foreign, header.data(), header.size(), 0) == 4096);
  CHECK(!SharedFile::open(foreign));  // the header is right, but the file could shrink
  CHECK(::fcntl(foreign, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
  CHECK(!SharedFile::open(foreign));  // and it is too small
  ::close(foreign);
}

TEST(a_machine_counts_living_processes_only) {
  const MachineFile machine_file;
  const auto machine = machine_file.join();
  const auto file = SharedFile::make(facts());
  in_child([&] {
    machine->close_in_child();
    const auto other = machine_file.join();
    CHECK(other->take(0, 5 * kGranule, 8 * kGranule));
    CHECK(!other->take(0, 4 * kGranule, 8 * kGranule));
    CHECK(other->used(0) == 5 * kGranule && other->used(1) == 0);
    CHECK(other->hold(*SharedFile::open(file->descriptor()), 0, false));
    CHECK(other->used(0) == 7 * kGranule);
    ::_exit(0);
  });
  CHECK(machine->used(0) == 0);
  CHECK(machine->hold(*file, 0, false));  // its old entry has no living holder
  CHECK(machine->used(0) == 2 * kGranule);
  machine->let_go(*file);
  CHECK(machine->used(0) == 0);
}

TEST(a_shared_allocation_counts_once) {
  const MachineFile machine_file;
  const auto first = machine_file.join(), second = machine_file.join();
  const auto file = SharedFile::make(facts());
  CHECK(first->take(3, 2 * kGranule, 2 * kGranule));
  CHECK(first->hold(*file, 3, true));
  CHECK(second->hold(*file, 3, false));
  for (Machine* const machine : {first.get(), second.get()})
    CHECK(machine->used(3) == 2 * kGranule);
  CHECK(!second->take(3, 1, 2 * kGranule));
  first->let_go(*file);
  CHECK(first->used(3) == 2 * kGranule);
  second->let_go(*file);
  CHECK(first->used(3) == 0);
}

// A forked child would otherwise keep the slot of a parent that has died.
TEST(a_child_does_not_keep_its_parent_s_slot) {
  const MachineFile machine_file;
  simcuda_reset(("memory=67108864\nmachine=" + machine_file.path + "\n").c_str());
  OK(cuInit(0));
  create(3 * kGranule);
  CHECK(::access(machine_file.path.c_str(), R_OK) == 0);
  int ends[2], begun[2];
  CHECK(::pipe(ends) == 0 && ::pipe(begun) == 0);
  const pid_t child = ::fork();
  char byte = 0;
  if (child == 0) {
    ::close(ends[1]);
    if (::write(begun[1], &byte, 1) != 1) ::_exit(2);
    ::_exit(static_cast<int>(::read(ends[0], &byte, 1)));  // lives until its parent lets it end
  }
  CHECK(::read(begun[0], &byte, 1) == 1);  // by now it has closed the machine's file
  simcuda_reset(nullptr);                  // the parent leaves the machine
  Options options = machine_file.options;
  options.memory = 67108864;
  std::unique_ptr<Machine> machine;
  std::string error;
  CHECK(Machine::join(options, &machine, &error));
  CHECK(machine->used(0) == 0);
  for (const int end : {ends[0], ends[1], begun[0], begun[1]}) ::close(end);
  CHECK(::waitpid(child, nullptr, 0) == child);
}

TEST(a_machine_has_slots_for_64_processes) {
  const MachineFile machine_file;
  std::vector<std::unique_ptr<Machine>> all;
  for (int i = 0; i < 64; ++i) all.push_back(machine_file.join());
  std::unique_ptr<Machine> more;
  std::string error;
  CHECK(!Machine::join(machine_file.options, &more, &error));
  CHECK(error.find("no slot for another process") != std::string::npos);
  all[17].reset();
  CHECK(Machine::join(machine_file.options, &more, &error));
}
