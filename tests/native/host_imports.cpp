// Guarantees of driver.h for granules of another process. The other process is another driver here:
// a driver knows of another one only what a process would.
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <vector>

#include "fixtures.h"

namespace warmserve {
namespace {

constexpr std::size_t kPlaces = 8;

void ok(Status status) { CHECK(status == Status::ok); }

// A driver with a reservation.
struct Process {
  Process() { ok(driver->address_reserve(kPlaces * kGranule, &address)); }

  // Makes granules whose bytes are `first`, `first` + 1, ..., and exports them.
  std::vector<SharedGranule> share(std::size_t count, unsigned char first) {
    std::vector<SharedGranule> all(count);
    for (SharedGranule& shared : all) {
      Handle& granule = granules.emplace_back();
      ok(driver->granule_create(kGranule, &granule));
      std::memset(driver->host_view(granule), first++, kGranule);
      ok(driver->granule_export(granule, &shared));
    }
    return all;
  }
  // Imports granules and closes their descriptors.
  void import(const std::vector<SharedGranule>& all) {
    for (const SharedGranule& shared : all) {
      ok(driver->granule_import(shared, kGranule, &granules.emplace_back()));
      ::close(shared.descriptor);
    }
  }
  void map() {
    ok(driver->map(address, granules.data(), granules.size()));
    ok(driver->set_access(address, granules.size() * kGranule, Access::read));
  }
  unsigned char at(std::size_t place) const {
    const auto* begin = reinterpret_cast<const unsigned char*>(address + place * kGranule);
    CHECK(std::memcmp(begin, begin + 1, kGranule - 1) == 0);
    return *begin;
  }
  // Returns the number of the kernel's mappings of files in the reservation.
  std::size_t kernel_mappings() const {
    std::ifstream maps("/proc/self/maps");
    std::size_t count = 0;
    for (std::string line; std::getline(maps, line);) {
      const Address begin = std::stoull(line, nullptr, 16);
      count += begin >= address && begin < address + kPlaces * kGranule &&
               line.find("memfd:") != std::string::npos;
    }
    return count;
  }

  std::shared_ptr<Driver> driver = make_host_driver({});
  Address address = 0;
  std::vector<Handle> granules;
};

std::size_t open_descriptors() {
  std::size_t count = 0;
  for (int i = 0; i < 1024; ++i) count += ::fcntl(i, F_GETFD) >= 0;
  return count;
}

}  // namespace

TEST(neighbours_in_one_file_are_one_kernel_mapping) {
  Process owner, other, importer;
  importer.import(owner.share(3, 1));
  importer.import(other.share(2, 4));
  Handle own = Handle::none;
  ok(importer.driver->granule_create(kGranule, &own));
  importer.granules.push_back(own);
  importer.map();
  for (std::size_t place = 0; place < 5; ++place) CHECK(importer.at(place) == place + 1);
  CHECK(importer.kernel_mappings() == 3);
  // A part of a run leaves, and the rest keeps its bytes.
  ok(importer.driver->unmap(importer.address, kGranule));
  CHECK(importer.at(1) == 2);
  CHECK(importer.kernel_mappings() == 3);
}

// Each file begins with an offset of 0 after the end of another.
TEST(neighbours_in_two_files_are_two_kernel_mappings) {
  Process owner, other, importer;
  const auto first = owner.share(1, 1), second = other.share(2, 8);
  importer.import({first[0], second[1]});
  ::close(second[0].descriptor);
  importer.map();
  CHECK(importer.at(0) == 1 && importer.at(1) == 9);
  CHECK(importer.kernel_mappings() == 2);
}

TEST(handles_of_imports_are_no_handles_of_own_granules) {
  Process owner, importer;
  Handle own = Handle::none;
  ok(importer.driver->granule_create(kGranule, &own));
  importer.import(owner.share(2, 1));
  CHECK(importer.granules[0] != own && importer.granules[1] != own);
  CHECK(importer.granules[0] != importer.granules[1]);
  CHECK(importer.driver->host_view(importer.granules[0]) == nullptr);
  CHECK(importer.driver->host_view(own) != nullptr);
}

TEST(an_import_lives_until_it_is_unmapped_and_frees_nothing) {
  const std::size_t before = open_descriptors();
  Process owner;
  const std::size_t with_owner = open_descriptors();
  {
    Process importer;
    const std::size_t with_both = open_descriptors();
    importer.import(owner.share(2, 1));
    CHECK(open_descriptors() == with_both + 1);
    importer.map();
    for (const Handle granule : importer.granules) ok(importer.driver->granule_release(granule));
    CHECK(importer.driver->granule_release(importer.granules[0]) == Status::invalid);
    CHECK(importer.at(0) == 1 && importer.at(1) == 2);
    CHECK(open_descriptors() == with_both + 1);
    ok(importer.driver->unmap(importer.address, 2 * kGranule));
    CHECK(open_descriptors() == with_both);
  }
  CHECK(open_descriptors() == with_owner);
  owner.map();
  CHECK(owner.at(0) == 1 && owner.at(1) == 2);
  owner.driver.reset();
  CHECK(open_descriptors() == before);
}

TEST(the_memory_outlives_the_process_that_made_it) {
  Process importer;
  {
    Process owner;
    importer.import(owner.share(2, 1));
  }
  importer.map();
  CHECK(importer.at(0) == 1 && importer.at(1) == 2);
}

TEST(misuse_of_shared_granules_is_refused) {
  Process owner, importer;
  auto shared = owner.share(1, 1);
  importer.import({shared[0]});
  importer.map();
  SharedGranule none;
  for (const Handle granule : {importer.granules[0], Handle::none, Handle{~0ull}}) {
    CHECK(importer.driver->granule_export(granule, &none) == Status::invalid);
    CHECK(none.descriptor == -1);
  }
  ok(importer.driver->unmap(importer.address, kGranule));
  ok(importer.driver->map(importer.address, importer.granules.data(), 1));
  CHECK(importer.driver->set_access(importer.address, kGranule, Access::read_write) ==
        Status::invalid);
  CHECK(importer.driver->detail() == "a granule of another process can only be read");
  ok(owner.driver->granule_export(owner.granules[0], &shared[0]));
  Handle out = Handle::none;
  const auto refused = [&](std::uint64_t offset, std::uint64_t bytes) {
    const SharedGranule wrong{shared[0].descriptor, offset};
    return importer.driver->granule_import(wrong, bytes, &out) == Status::invalid;
  };
  CHECK(refused(0, 0) && refused(0, kGranule / 2) && refused(0, 2 * kGranule));
  CHECK(refused(kGranule, kGranule) && refused(4096, kGranule) && refused(~kGranule + 1, kGranule));
  ::close(shared[0].descriptor);
  CHECK(refused(0, kGranule));
  ok(owner.driver->granule_release(owner.granules[0]));
  CHECK(owner.driver->granule_export(owner.granules[0], &none) == Status::invalid);
}

}  // namespace warmserve
