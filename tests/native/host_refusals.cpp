// The host driver refuses calls that break the contract of driver.h, even without the strict driver
// above it. A refused call changes nothing.
#include <array>
#include <cstring>
#include <vector>

#include "driver/host/addresses.h"
#include "fixtures.h"

namespace warmserve {
namespace {

struct Bench {
  Bench() : driver(make_host_driver({.threads = false})) {
    for (Address* address : {&first, &second})
      CHECK(driver->address_reserve(2 * kGranule, address) == Status::ok);
    for (Handle& granule : granules)
      CHECK(driver->granule_create(kGranule, &granule) == Status::ok);
  }
  Status map(Address address, std::size_t count = 1) {
    return driver->map(address, granules.data(), count);
  }

  std::shared_ptr<Driver> driver;
  Address first = 0, second = 0;  // reservations of two granules
  std::array<Handle, 3> granules{};
};

}  // namespace

TEST(a_map_outside_of_a_reservation_is_refused) {
  Bench bench;
  CHECK(bench.map(bench.first, 3) == Status::invalid);
  CHECK(bench.map(bench.first + kGranule, 2) == Status::invalid);
  CHECK(bench.map(bench.first + (std::uint64_t{1} << 46)) == Status::invalid);
  CHECK(bench.map(0) == Status::invalid);
  CHECK(bench.map(~kGranule + 1) == Status::invalid);
  CHECK(bench.map(bench.first, 0) == Status::invalid);
  const std::vector<std::byte> own(4);
  CHECK(bench.map(reinterpret_cast<Address>(own.data()) / kGranule * kGranule) == Status::invalid);
  CHECK(bench.map(bench.first, 2) == Status::ok);
}

TEST(a_map_over_a_live_mapping_is_refused_and_leaves_it) {
  Bench bench;
  CHECK(bench.map(bench.first + kGranule) == Status::ok);
  CHECK(bench.driver->set_access(bench.first + kGranule, kGranule, Access::read_write) ==
        Status::ok);
  auto* memory = reinterpret_cast<unsigned char*>(bench.first + kGranule);
  std::memset(memory, 0xAB, kGranule);
  CHECK(bench.driver->map(bench.first + kGranule, &bench.granules[1], 1) == Status::invalid);
  CHECK(bench.driver->map(bench.first, &bench.granules[1], 2) == Status::invalid);
  CHECK(memory[0] == 0xAB && memory[kGranule - 1] == 0xAB);
}

TEST(a_map_of_a_granule_that_the_device_does_not_own_is_refused) {
  Bench bench, other;
  const Handle unknown{(std::uint64_t{1} << 40) + 1};
  CHECK(bench.driver->map(bench.first, &unknown, 1) == Status::invalid);
  const Handle none = Handle::none;
  CHECK(bench.driver->map(bench.first, &none, 1) == Status::invalid);
  CHECK(bench.driver->granule_release(bench.granules[0]) == Status::ok);
  CHECK(bench.map(bench.first) == Status::invalid);
  CHECK(bench.driver->granule_release(bench.granules[0]) == Status::invalid);
  CHECK(!bench.driver->host_view(bench.granules[0]));
}

TEST(a_map_at_an_address_that_is_not_aligned_is_refused) {
  Bench bench;
  for (const std::uint64_t offset : {std::uint64_t{1}, std::uint64_t{4096}, kGranule / 2})
    CHECK(bench.map(bench.first + offset) == Status::invalid);
}

TEST(unmapped_addresses_cannot_be_unmapped_or_given_access) {
  Bench bench;
  const auto both = [&](Address address, std::uint64_t bytes) {
    return bench.driver->unmap(address, bytes) == Status::invalid &&
           bench.driver->set_access(address, bytes, Access::read) == Status::invalid;
  };
  CHECK(both(bench.first, kGranule));
  CHECK(bench.map(bench.first) == Status::ok);
  CHECK(both(bench.first, 0));
  CHECK(both(bench.first, kGranule / 2));
  CHECK(both(bench.first, 2 * kGranule));
  CHECK(both(bench.first + 4096, kGranule));
  CHECK(both(bench.second, kGranule));
  CHECK(both(bench.first, ~std::uint64_t{0}));
  CHECK(bench.driver->unmap(bench.first, kGranule) == Status::ok);
  CHECK(both(bench.first, kGranule));
}

TEST(a_part_of_a_mapping_can_be_unmapped) {
  Bench bench;
  CHECK(bench.map(bench.first, 2) == Status::ok);
  CHECK(bench.driver->unmap(bench.first, kGranule) == Status::ok);
  CHECK(bench.driver->set_access(bench.first + kGranule, kGranule, Access::read) == Status::ok);
  CHECK(bench.driver->unmap(bench.first + kGranule, kGranule) == Status::ok);
}

TEST(only_a_whole_reservation_without_mappings_is_freed) {
  Bench bench;
  CHECK(bench.driver->address_free(bench.first, kGranule) == Status::invalid);
  CHECK(bench.driver->address_free(bench.first + kGranule, kGranule) == Status::invalid);
  CHECK(bench.map(bench.first + kGranule) == Status::ok);
  CHECK(bench.driver->address_free(bench.first, 2 * kGranule) == Status::invalid);
  CHECK(bench.driver->unmap(bench.first + kGranule, kGranule) == Status::ok);
  CHECK(bench.driver->address_free(bench.first, 2 * kGranule) == Status::ok);
  CHECK(bench.driver->address_free(bench.first, 2 * kGranule) == Status::invalid);
}

TEST(only_a_whole_pinned_region_is_released) {
  Bench bench;
  std::byte* pinned = nullptr;
  CHECK(bench.driver->pinned_create(kGranule, &pinned) == Status::ok);
  CHECK(bench.driver->pinned_release(pinned, kGranule / 2) == Status::invalid);
  CHECK(bench.driver->pinned_release(pinned + 4096, kGranule) == Status::invalid);
  CHECK(bench.driver->pinned_release(pinned, kGranule) == Status::ok);
  CHECK(bench.driver->pinned_release(pinned, kGranule) == Status::invalid);
}

TEST(sizes_near_the_end_of_64_bits_are_refused) {
  Bench bench;
  Handle granule{};
  Address address = 0;
  std::byte* pinned = nullptr;
  for (const std::uint64_t bytes :
       {~kGranule + 1, std::uint64_t{1} << 63, std::uint64_t{1} << 62}) {
    CHECK(bench.driver->granule_create(bytes, &granule) != Status::ok);
    CHECK(bench.driver->address_reserve(bytes, &address) == Status::out_of_addresses);
    CHECK(bench.driver->pinned_create(bytes, &pinned) == Status::out_of_memory);
  }
}

TEST(runs_are_counted_as_the_kernel_has_them) {
  HostAddresses table(kGranule);
  table.reserve(kGranule, 8 * kGranule);
  const std::array<HostAddresses::Mapped, 4> granules{{{Handle{1}, kGranule, true},
                                                       {Handle{2}, kGranule, false},
                                                       {Handle{3}, kGranule, false},
                                                       {Handle{9}, kGranule, true}}};
  CHECK(table.can_map(kGranule, 8 * kGranule) && !table.can_map(kGranule, 9 * kGranule));
  table.map(2 * kGranule, granules);
  CHECK(table.runs() == 2);
  table.unmap(*table.whole(3 * kGranule, kGranule));  // cuts a run in two
  CHECK(table.runs() == 3);
  table.unmap(*table.whole(2 * kGranule, kGranule));
  CHECK(table.runs() == 2);
  CHECK(table.can_map(kGranule, 3 * kGranule) && !table.can_map(kGranule, 4 * kGranule));
}

}  // namespace warmserve
