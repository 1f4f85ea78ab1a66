// Guarantees of driver.h for granules and addresses that the host driver could break unnoticed.
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "driver/host_limits.h"
#include "fixtures.h"

namespace warmserve {
namespace {

struct Bench {
  explicit Bench(const HostOptions& options = {}) : driver(make_host_driver(options)) {
    ok(driver->address_reserve(kPlaces * kGranule, &address));
  }
  ~Bench() { ok(driver->address_free(address, kPlaces * kGranule)); }

  static void ok(Status status) { CHECK(status == Status::ok); }
  Handle granule() {
    Handle handle{};
    ok(driver->granule_create(kGranule, &handle));
    return handle;
  }
  // Maps granules side by side from a place on. Returns their address.
  unsigned char* map(std::size_t place, std::initializer_list<Handle> granules,
                     Access access = Access::read_write) {
    ok(driver->map(address + place * kGranule, granules.begin(), granules.size()));
    ok(driver->set_access(address + place * kGranule, granules.size() * kGranule, access));
    return at(place);
  }
  void unmap(std::size_t place, std::size_t count = 1) {
    ok(driver->unmap(address + place * kGranule, count * kGranule));
  }
  unsigned char* at(std::size_t place) {
    return reinterpret_cast<unsigned char*>(address + place * kGranule);
  }

  static constexpr std::size_t kPlaces = 8;
  std::shared_ptr<Driver> driver;
  Address address = 0;
};

bool all(const unsigned char* memory, unsigned char value) {
  return memory[0] == value && std::memcmp(memory, memory + 1, kGranule - 1) == 0;
}

// Returns whether memory is readable. Asks the kernel, because a direct access could fault.
bool readable(const void* memory) {
  int ends[2];
  CHECK(::pipe(ends) == 0);
  const bool could = ::write(ends[1], memory, 1) == 1;
  ::close(ends[0]);
  ::close(ends[1]);
  return could;
}
bool writable(void* memory) {
  int ends[2];
  CHECK(::pipe(ends) == 0);
  const bool could = ::write(ends[1], "!", 1) == 1 && ::read(ends[0], memory, 1) == 1;
  ::close(ends[0]);
  ::close(ends[1]);
  return could;
}

}  // namespace

TEST(a_new_granule_is_zero_after_any_earlier_use) {
  for (const bool huge_pages : {true, false}) {
    Bench bench({.huge_pages = huge_pages});
    for (int i = 0; i < 3; ++i) {
      const Handle granule = bench.granule();
      unsigned char* memory = bench.map(0, {granule});
      CHECK(all(memory, 0));
      std::memset(memory, 0xAB, kGranule);
      bench.unmap(0);
      Bench::ok(bench.driver->granule_release(granule));
    }
  }
}

TEST(a_granule_released_while_mapped_lives_until_it_is_unmapped) {
  Bench bench;
  const Handle released = bench.granule();
  unsigned char* memory = bench.map(0, {released});
  std::memset(memory, 0xAB, kGranule);
  Bench::ok(bench.driver->granule_release(released));
  CHECK(all(memory, 0xAB));
  const Handle next = bench.granule();
  std::memset(bench.map(1, {next}), 0xCD, kGranule);
  CHECK(all(memory, 0xAB));
  bench.unmap(0, 2);
  Bench::ok(bench.driver->granule_release(next));
}

TEST(a_granule_at_two_addresses_has_one_content) {
  Bench bench;
  const Handle a = bench.granule(), b = bench.granule();
  unsigned char* first = bench.map(0, {a, b});
  unsigned char* second = bench.map(3, {b, a}, Access::read);
  first[5] = 1;
  first[kGranule + 5] = 2;
  CHECK(second[5] == 2 && second[kGranule + 5] == 1);
  if (std::byte* view = bench.driver->host_view(a)) CHECK(view[5] == std::byte{1});
  bench.unmap(0, 2);
  CHECK(second[5] == 2 && second[kGranule + 5] == 1);
  bench.unmap(3, 2);
  for (const Handle handle : {a, b}) Bench::ok(bench.driver->granule_release(handle));
}

TEST(memory_has_the_access_that_was_set) {
  Bench bench;
  const Handle granule = bench.granule();
  CHECK(!readable(bench.at(0)));
  Bench::ok(bench.driver->map(bench.address, &granule, 1));
  CHECK(!readable(bench.at(0)));
  Bench::ok(bench.driver->set_access(bench.address, kGranule, Access::read));
  CHECK(readable(bench.at(0)) && !writable(bench.at(0)));
  bench.map(1, {granule});
  CHECK(readable(bench.at(1)) && writable(bench.at(1)));
  bench.unmap(0, 2);
  CHECK(!readable(bench.at(0)) && !readable(bench.at(1)));
  Bench::ok(bench.driver->granule_release(granule));
}

TEST(a_hidden_host_view_is_null) {
  Bench bench({.host_view = false});
  const Handle granule = bench.granule();
  CHECK(!bench.driver->facts().host_view && !bench.driver->host_view(granule));
  Bench::ok(bench.driver->granule_release(granule));
}

TEST(sizes_that_are_not_multiples_of_a_granule_are_refused) {
  Bench bench;
  Handle granule{};
  Address address = 0;
  std::byte* pinned = nullptr;
  for (const std::uint64_t bytes : {std::uint64_t{0}, kGranule / 2, kGranule + 4096}) {
    CHECK(bench.driver->granule_create(bytes, &granule) == Status::invalid);
    CHECK(bench.driver->address_reserve(bytes, &address) == Status::invalid);
  }
  CHECK(bench.driver->pinned_create(0, &pinned) == Status::invalid);
  CHECK(bench.driver->granule_release(Handle{4711}) == Status::invalid);
}

// Requests beyond the limits must fail, because the kernel's out-of-memory killer could kill any
// process.
TEST(reserving_more_addresses_than_exist_fails) {
  Bench bench;
  Address address = 0;
  CHECK(bench.driver->address_reserve(std::uint64_t{1} << 60, &address) ==
        Status::out_of_addresses);
  std::byte* pinned = nullptr;
  CHECK(bench.driver->pinned_create(std::uint64_t{1} << 60, &pinned) == Status::out_of_memory);
}

// A fake /proc and /sys of a machine, made of files with these contents.
struct Machine {
  explicit Machine(std::initializer_list<std::pair<const char*, const char*>> files) {
    for (const auto& [path, content] : files) {
      std::filesystem::create_directories((root + path).substr(0, (root + path).rfind('/')));
      std::ofstream(root + path) << content;
    }
  }
  ~Machine() { std::filesystem::remove_all(root); }

  const std::string root =
      std::filesystem::temp_directory_path() / ("warmserve-machine-" + std::to_string(::getpid()));
};

TEST(available_memory_is_the_least_of_machine_and_groups) {
  const auto meminfo = std::pair("/proc/meminfo", "MemTotal: 9 kB\nMemAvailable:     4096 kB\n");
  CHECK(available_memory(Machine({meminfo}).root) == 4096 * kKiB);
  // Version 2: a group without a limit inside a group that is full, except for page cache.
  const auto group = std::pair("/proc/self/cgroup", "0::/service/worker\n");
  const Machine full({meminfo,
                      group,
                      {"/sys/fs/cgroup/service/worker/memory.max", "max\n"},
                      {"/sys/fs/cgroup/service/worker/memory.current", "900000\n"},
                      {"/sys/fs/cgroup/service/memory.max", "1000000\n"},
                      {"/sys/fs/cgroup/service/memory.current", "1000000\n"},
                      {"/sys/fs/cgroup/service/memory.stat",
                       "anon 500000\nshmem 100000\ninactive_file 1000\nactive_file 30000\n"}});
  CHECK(available_memory(full.root) == 31000);
}

TEST(available_memory_respects_groups_of_the_first_version) {
  const Machine machine(
      {{"/proc/meminfo", "MemAvailable: 4096 kB\n"},
       {"/proc/self/cgroup", "4:memory:/service\n1:cpu:/\n0::/\n"},
       {"/sys/fs/cgroup/memory/service/memory.limit_in_bytes", "1000000\n"},
       {"/sys/fs/cgroup/memory/service/memory.usage_in_bytes", "400000\n"},
       {"/sys/fs/cgroup/memory/service/memory.stat",
        "inactive_file 1\nactive_file 2\ntotal_inactive_file 10\ntotal_active_file 20\n"}});
  CHECK(available_memory(machine.root) == 600030);
}

}  // namespace warmserve
