// The page table of the simulated driver: legal and illegal mappings and releases, the lifetime of
// memory, and granules that are mapped at two addresses.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <numeric>

#include "kernels/kernels.h"
#include "simcuda_fixtures.h"

using namespace simcuda_test;

namespace {

std::size_t available() {
  std::size_t free = 0, total = 0;
  OK(cuMemGetInfo_v2(&free, &total));
  return free;
}

CUfunction kernel(const warmserve::KernelCall& call) {
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  OK(cuModuleLoadData(&module, "simulated"));
  OK(cuModuleGetFunction(&function, module, kernel_symbol(call)));
  FAILS(NOT_FOUND, cuModuleGetFunction(&function, module, "ws_no_such_kernel"));
  return function;
}

template <class Call>
CUresult launch(Call call, CUstream stream) {
  void* parameters[] = {&call};
  return cuLaunchKernel(kernel(call), 1, 1, 1, 32, 1, 1, 0, stream, parameters, nullptr);
}

}  // namespace

TEST(mapping_obeys_the_rules) {
  begin();
  const CUdeviceptr at = reserve(4 * kGranule);
  const auto one = create(), two = create(2 * kGranule);
  FAILS(NOT_SUPPORTED, cuMemMap(at, kGranule, kGranule, one, 0));              // an offset
  FAILS(INVALID_VALUE, cuMemMap(at, kGranule, 0, one, 1));                     // a flag
  FAILS(NOT_SUPPORTED, cuMemMap(at, kGranule, 0, two, 0));                     // part of a handle
  FAILS(INVALID_VALUE, cuMemMap(at + 4096, kGranule, 0, one, 0));              // not on a granule
  FAILS(INVALID_VALUE, cuMemMap(at + 3 * kGranule, 2 * kGranule, 0, two, 0));  // past the end
  OK(cuMemMap(at, kGranule, 0, one, 0));
  FAILS(INVALID_VALUE, cuMemMap(at, kGranule, 0, one, 0));  // over a mapping
  OK(cuMemMap(at + kGranule, 2 * kGranule, 0, two, 0));

  // A mapping has no access at first. Access is set for whole mappings without holes.
  unsigned char byte = 1;
  FAILS(INVALID_VALUE, cuMemcpyHtoD_v2(at, &byte, 1));
  CHECK(set_access(at + kGranule, kGranule) == CUDA_ERROR_INVALID_VALUE);
  CHECK(set_access(at, 4 * kGranule) == CUDA_ERROR_INVALID_VALUE);
  OK(set_access(at, 3 * kGranule));
  OK(cuMemcpyHtoD_v2(at, &byte, 1));
  OK(cuCtxSynchronize());  // a copy from pageable memory waits only until its source is read

  FAILS(INVALID_VALUE, cuMemAddressFree(at, 4 * kGranule));  // it contains mappings
  FAILS(INVALID_VALUE, cuMemUnmap(at + kGranule, kGranule));
  FAILS(INVALID_VALUE, cuMemUnmap(at, 4 * kGranule));
  OK(cuMemUnmap(at, 3 * kGranule));  // two mappings at once
  FAILS(INVALID_VALUE, cuMemUnmap(at, kGranule));
  FAILS(INVALID_VALUE, cuMemAddressFree(at, kGranule));
  OK(cuMemAddressFree(at, 4 * kGranule));
  FAILS(INVALID_VALUE, cuMemMap(at, kGranule, 0, one, 0));
  OK(cuMemRelease(one));
  OK(cuMemRelease(two));
  CHECK(violations() == 0);
  FAILS(INVALID_VALUE, cuMemRelease(one));
  CHECK(violations("misuse") == 1);
}

TEST(memory_lives_as_long_as_something_needs_it) {
  begin();
  const std::size_t all = available();
  const auto handle = create();
  const CUdeviceptr first = reserve(), second = reserve();
  map(first, handle);
  map(second, handle);
  OK(cuMemsetD8_v2(first, 7, kGranule));
  OK(cuCtxSynchronize());
  CHECK(holds(second, kGranule, 7));  // the same granule
  OK(cuMemRelease(handle));
  CHECK(available() == all - kGranule);
  CUmemGenericAllocationHandle again = 0;
  OK(cuMemRetainAllocationHandle(&again, reinterpret_cast<void*>(first + 123)));
  CHECK(again == handle);
  OK(cuMemUnmap(first, kGranule));
  OK(cuMemUnmap(second, kGranule));
  CHECK(available() == all - kGranule);
  map(first, again);
  CHECK(holds(first, kGranule, 7));
  OK(cuMemUnmap(first, kGranule));
  OK(cuMemRelease(again));
  CHECK(available() == all);
}

TEST(memory_is_bounded) {
  begin();
  std::vector<CUmemGenericAllocationHandle> handles;
  for (int i = 0; i < 32; ++i) handles.push_back(create());
  CUmemGenericAllocationHandle none = 0;
  const CUmemAllocationProp wanted = prop();
  FAILS(OUT_OF_MEMORY, cuMemCreate(&none, kGranule, &wanted, 0));
  OK(cuMemRelease(handles.back()));
  simcuda_others_hold(kGranule);
  FAILS(OUT_OF_MEMORY, cuMemCreate(&none, kGranule, &wanted, 0));
  simcuda_others_hold(0);
  OK(cuMemCreate(&none, kGranule, &wanted, 0));
  CUdeviceptr plain = 0;
  FAILS(OUT_OF_MEMORY, cuMemAlloc_v2(&plain, 1));
}

TEST(memory_can_be_shared_by_descriptor) {
  begin();
  CUmemAllocationProp wanted = prop();
  wanted.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  CUmemGenericAllocationHandle handle = 0, imported = 0;
  OK(cuMemCreate(&handle, kGranule, &wanted, 0));
  int fd = -1;
  OK(cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
  CHECK(::fcntl(fd, F_GETFD) & FD_CLOEXEC);
  OK(cuMemImportFromShareableHandle(&imported, reinterpret_cast<void*>(std::intptr_t{fd}),
                                    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
  ::close(fd);
  OK(cuMemRelease(handle));
  const CUdeviceptr at = reserve();
  map(at, imported);
  const auto private_one = create();
  FAILS(INVALID_VALUE, cuMemExportToShareableHandle(&fd, private_one,
                                                    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
}

TEST(registration_obeys_the_rules) {
  begin();
  std::vector<unsigned char> host(3 << 20);
  unsigned char* const at = host.data();
  OK(cuMemHostRegister_v2(at + 1, 1000, 0));  // unaligned
  FAILS(HOST_MEMORY_ALREADY_REGISTERED, cuMemHostRegister_v2(at, 4096, 0));
  FAILS(HOST_MEMORY_ALREADY_REGISTERED, cuMemHostRegister_v2(at + 1000, 4096, 0));
  OK(cuMemHostRegister_v2(at + 1001, 10, 0));  // another range on the same page
  FAILS(INVALID_VALUE, cuMemHostRegister_v2(at + 2048, 0, 0));
  FAILS(INVALID_VALUE, cuMemHostRegister_v2(reinterpret_cast<void*>(64), 4096, 0));
  FAILS(INVALID_VALUE, cuMemHostUnregister(at + 2));
  FAILS(HOST_MEMORY_NOT_REGISTERED, cuMemHostUnregister(at + 4096));
  FAILS(INVALID_VALUE, cuMemHostUnregister(nullptr));
  const CUdeviceptr device = mapped();
  FAILS(INVALID_VALUE, cuMemcpyHtoD_v2(device, at + 500, 4096));  // partly pinned
  OK(cuMemHostUnregister(at + 1));
  OK(cuMemHostUnregister(at + 1001));
  unsigned char* const allocated = pinned(4096);
  FAILS(INVALID_VALUE, cuMemHostUnregister(allocated));
  OK(cuMemFreeHost(allocated));
  OK(cuMemFreeHost(nullptr));
}

TEST(registering_read_only_memory_needs_a_flag) {
  const int fd = ::memfd_create("read-only", 0);
  CHECK(fd >= 0 && ::ftruncate(fd, 3 * 4096) == 0);
  for (const int sharing : {MAP_PRIVATE, MAP_SHARED}) {
    void* const pages = ::mmap(nullptr, 3 * 4096, PROT_READ, sharing, fd, 0);
    CHECK(pages != MAP_FAILED);
    begin();
    FAILS(INVALID_VALUE, cuMemHostRegister_v2(pages, 3 * 4096, 0));
    OK(cuMemHostRegister_v2(pages, 3 * 4096, CU_MEMHOSTREGISTER_READ_ONLY));
    const CUdeviceptr device = mapped();
    OK(cuMemcpyHtoD_v2(device, pages, 3 * 4096));
    FAILS(INVALID_VALUE, cuMemcpyDtoH_v2(pages, device, 3 * 4096));
    OK(cuMemHostUnregister(pages));
    // First the middle page is read-only; then it is not mapped.
    auto* const middle = static_cast<std::byte*>(pages) + 4096;
    CHECK(::mmap(pages, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                 -1, 0) == pages);
    CHECK(::mprotect(middle, 4096, PROT_READ) == 0);
    FAILS(INVALID_VALUE, cuMemHostRegister_v2(pages, 3 * 4096, 0));
    OK(cuMemHostRegister_v2(pages, 4096, 0));
    OK(cuMemHostUnregister(pages));
    CHECK(::mprotect(middle, 4096, PROT_NONE) == 0);
    FAILS(INVALID_VALUE, cuMemHostRegister_v2(pages, 3 * 4096, CU_MEMHOSTREGISTER_READ_ONLY));
    begin("read_only_register=0");
    FAILS(NOT_SUPPORTED, cuMemHostRegister_v2(pages, 4096, CU_MEMHOSTREGISTER_READ_ONLY));
    ::munmap(pages, 3 * 4096);
  }
  ::close(fd);
}

TEST(the_cpu_reaches_host_memory) {
  begin("integrated=1");
  CUmemAllocationProp of_host = prop();
  of_host.location.type = CU_MEM_LOCATION_TYPE_HOST_NUMA;
  // Granules whose slots are neither adjacent nor in order.
  std::vector<CUmemGenericAllocationHandle> pieces;
  for (int i = 0; i < 6; ++i) pieces.push_back(create());
  for (const int i : {4, 0, 3}) OK(cuMemRelease(pieces[i]));
  CUmemGenericAllocationHandle handle = 0;
  OK(cuMemCreate(&handle, 5 * kGranule, &of_host, 0));
  const CUdeviceptr at = reserve(5 * kGranule);
  OK(cuMemMap(at, 5 * kGranule, 0, handle, 0));
  OK(cuMemRelease(handle));
  const CUmemAccessDesc both[] = {
      {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE},
      {{CU_MEM_LOCATION_TYPE_HOST_NUMA, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE}};
  OK(cuMemSetAccess(at, 5 * kGranule, both, 2));
  auto* const bytes = reinterpret_cast<unsigned char*>(at);
  for (std::size_t i = 0; i < 5; ++i)
    std::memset(bytes + i * kGranule, static_cast<int>(i), kGranule);
  std::vector<unsigned char> back(5 * kGranule);
  OK(cuMemcpyDtoH_v2(back.data(), at, back.size()));
  CHECK(std::memcmp(back.data(), bytes, back.size()) == 0);
  for (std::size_t i = 0; i < 5; ++i) CHECK(holds(at + i * kGranule, kGranule, i));
  OK(cuMemsetD8_v2(at + kGranule - 8, 77, 16));
  OK(cuCtxSynchronize());
  for (std::size_t i = 0; i < 16; ++i) CHECK(bytes[kGranule - 8 + i] == 77);
  OK(cuMemUnmap(at, 5 * kGranule));
  OK(cuMemAddressFree(at, 5 * kGranule));
  CHECK(violations() == 0);
}

TEST(only_leading_bytes_are_kept) {
  begin("content=4096\nclock=virtual");
  const CUdeviceptr at = mapped(2 * kGranule);
  std::vector<unsigned char> host(2 * kGranule, 5), back(2 * kGranule, 9);
  OK(cuMemcpyHtoD_v2(at, host.data(), host.size()));
  OK(cuMemcpyDtoH_v2(back.data(), at, back.size()));
  for (std::size_t i = 0; i < back.size(); ++i) CHECK(back[i] == (i % kGranule < 4096 ? 5 : 0));
  CHECK(peek(at + kGranule, 4097) == std::vector<unsigned char>(back.data(), back.data() + 4097));
  OK(cuMemsetD32_v2(at + kGranule + 4088, 0x01020304, 100));
  OK(cuCtxSynchronize());
  CHECK(peek(at + kGranule + 4092, 8) == std::vector<unsigned char>({4, 3, 2, 1, 0, 0, 0, 0}));
}

// Granules that are adjacent in the address space are not adjacent in the store.
TEST(kernels_see_adjacent_granules_as_one_range) {
  begin();
  const CUdeviceptr at = reserve(4 * kGranule);
  std::vector<CUmemGenericAllocationHandle> handles;
  for (int i = 0; i < 4; ++i) handles.push_back(create());
  for (int i = 0; i < 4; ++i) OK(cuMemMap(at + i * kGranule, kGranule, 0, handles[3 - i], 0));
  OK(set_access(at, 4 * kGranule));
  std::vector<unsigned char> content(3 * kGranule);
  std::iota(content.begin(), content.end(), 0);
  OK(cuMemcpyHtoD_v2(at, content.data(), content.size()));
  OK(cuCtxSynchronize());
  auto* const digests = reinterpret_cast<std::uint64_t*>(pinned(24));
  const CUstream s = stream();
  const warmserve::DigestCall on_device{at, 3 * kGranule, kGranule,
                                        reinterpret_cast<warmserve::Address>(digests)};
  OK(launch(on_device, s));
  OK(cuStreamSynchronize(s));
  std::uint64_t expected[3];
  run_on_cpu(warmserve::DigestCall{reinterpret_cast<warmserve::Address>(content.data()),
                                   3 * kGranule, kGranule,
                                   reinterpret_cast<warmserve::Address>(expected)});
  CHECK(std::memcmp(digests, expected, sizeof expected) == 0);

  // Source and destination each cross the border between two granules.
  const warmserve::GatherCall gather{at + kGranule - 64, at + 2 * kGranule - 100, 4, 50, 100};
  OK(launch(gather, s));
  OK(cuStreamSynchronize(s));
  for (std::size_t row = 0; row < 4; ++row) {
    const auto got = peek(gather.to + row * 50, 50);
    CHECK(std::memcmp(got.data(), &content[kGranule - 64 + row * 100], 50) == 0);
  }
  CHECK(violations() == 0);

  // An unmapped range is detected when the kernel runs; the error is sticky.
  OK(launch(warmserve::GatherCall{at, at + 5 * kGranule, 1, 8, 8}, s));
  FAILS(ILLEGAL_ADDRESS, cuStreamSynchronize(s));
  FAILS(ILLEGAL_ADDRESS, cuMemsetD8Async(at, 0, 1, s));
  CHECK(violations() == 1);
}

TEST(a_store_to_read_only_memory_kills_the_context) {
  begin();
  const CUdeviceptr at = mapped(), other = mapped();
  const CUstream s = stream();
  OK(cuMemsetD8Async(other, 1, 64, s));
  OK(cuStreamSynchronize(s));
  OK(set_access(at, kGranule, CU_MEM_ACCESS_FLAGS_PROT_READ));
  FAILS(INVALID_VALUE, cuMemsetD8Async(at, 1, 1, s));
  OK(launch(warmserve::GatherCall{other, at, 1, 64, 64}, s));
  FAILS(ILLEGAL_ADDRESS, cuStreamSynchronize(s));
}

TEST(a_misaligned_kernel_fails_with_that_error) {
  begin();
  const CUdeviceptr at = mapped();
  const CUstream s = stream();
  OK(cuMemsetD8Async(at, 1, 64, s));
  OK(launch(warmserve::DigestCall{at, 64, 64, at + 1001}, s));
  FAILS(MISALIGNED_ADDRESS, cuStreamSynchronize(s));
}
