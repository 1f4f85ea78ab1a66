// The end of the simulator, the process, a forked child and a context, with work in flight.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "simcuda_fixtures.h"

using namespace simcuda_test;

namespace {

constexpr const char* kSlow = "h2d=1000000\n";  // a copy of a granule takes 2 s

void busy(CUstream s) { OK(cuMemcpyHtoDAsync_v2(mapped(), pinned(kGranule), kGranule, s)); }

// Returns the exit status of a forked child that runs `body`.
int in_child(void (*body)()) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    body();
    std::exit(0);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  return status;
}

}  // namespace

// Must be the first test: this process has no threads yet, so its children can make simulators.
TEST(the_process_ends_with_work_in_flight) {
  CHECK(in_child([] {
          begin(kSlow);
          const CUstream one = stream(), two = stream(CU_STREAM_DEFAULT);
          busy(one);
          busy(two);
          busy(nullptr);
          OK(cuStreamDestroy_v2(two));
        }) == 0);
  CHECK(in_child([] {
          begin();
          // Registered after the driver's own handler, so it runs before the driver's end.
          std::atexit([] {
            int count = 0;
            if (cuDeviceGetCount(&count) != CUDA_SUCCESS) ::_exit(3);
          });
        }) == 0);
  // A host function that never returns does not block the exit.
  CHECK(in_child([] {
          begin();
          static std::atomic<bool> entered = false;
          const auto forever = [](void*) {
            entered = true;
            ::pause();
          };
          OK(cuLaunchHostFunc(stream(), forever, nullptr));
          while (!entered) ::usleep(100);
        }) == 0);
  CHECK(in_child([] {
          begin(kSlow);
          busy(stream());
          std::thread([] { std::exit(0); }).join();
        }) == 0);
}

TEST(calls_after_the_end_are_refused) {
  CHECK(in_child([] {
          static const struct AtEnd {
            ~AtEnd() {
              int count = 0;
              if (cuDeviceGetCount(&count) != CUDA_ERROR_DEINITIALIZED) ::_exit(3);
            }
          } at_end;
          begin();
        }) == 0);
}

TEST(the_simulator_ends_with_work_in_flight) {
  for (int i = 0; i < 20; ++i) {
    begin(kSlow);
    const CUstream one = stream(), two = stream();
    const CUevent e = event();
    busy(one);
    OK(cuEventRecord(e, one));
    OK(cuStreamWaitEvent(two, e, 0));
    busy(two);
    if (i % 2) OK(cuStreamDestroy_v2(two));
    CHECK(simcuda_reset("clock=virtual\n") == 0);
  }
  int count = 0;
  FAILS(NOT_INITIALIZED, cuDeviceGetCount(&count));
  CHECK(simcuda_reset("no=such option") == -1);
  CHECK(std::string(simcuda_error()).find("no=such") != std::string::npos);
}

TEST(handles_do_not_outlive_a_reset) {
  begin();
  const CUstream s = stream();
  const CUevent e = event();
  const CUdeviceptr at = mapped();
  CUcontext context = nullptr, current = nullptr;
  OK(cuCtxGetCurrent(&context));
  CHECK(simcuda_reset(nullptr) == 0);
  OK(cuInit(0));
  OK(cuCtxGetCurrent(&current));
  CHECK(current == nullptr);
  FAILS(INVALID_CONTEXT, cuCtxSetCurrent(context));
  begin();
  FAILS(INVALID_HANDLE, cuStreamSynchronize(s));
  FAILS(INVALID_HANDLE, cuEventQuery(e));
  FAILS(INVALID_VALUE, cuMemUnmap(at, kGranule));
}

TEST(a_forked_child_has_no_driver) {
  begin();
  CHECK(in_child([] {
          int count = 0;
          if (cuDeviceGetCount(&count) != CUDA_ERROR_NOT_INITIALIZED) ::_exit(3);
          if (cuInit(0) != CUDA_ERROR_NOT_INITIALIZED) ::_exit(4);
          if (simcuda_calls(nullptr) != 0) ::_exit(5);
          ::_exit(0);
        }) == 0);
  int count = 0;
  OK(cuDeviceGetCount(&count));
}

TEST(the_last_release_ends_the_context) {
  CUcontext again = nullptr;
  const CUcontext context = begin();
  OK(cuDevicePrimaryCtxRetain(&again, 0));
  CHECK(again == context);
  const CUstream s = stream();
  CUdeviceptr plain = 0;
  OK(cuMemAlloc_v2(&plain, 100));
  OK(cuMemsetD8Async(plain, 1, 100, s));
  OK(cuDevicePrimaryCtxRelease_v2(0));
  OK(cuStreamSynchronize(s));
  OK(cuMemsetD8Async(plain, 1, 100, s));
  OK(cuDevicePrimaryCtxRelease_v2(0));
  FAILS(INVALID_CONTEXT, cuDevicePrimaryCtxRelease_v2(0));
  FAILS(CONTEXT_IS_DESTROYED, cuStreamSynchronize(s));
  simcuda_check_leaks();
  CHECK(violations() == 0);
}

TEST(calls_fail_after_the_context_is_destroyed) {
  for (const std::string clock : {"clock=real\n", "clock=virtual\n"}) {
    begin(clock + kSlow);
    const CUstream s = stream();
    const CUdeviceptr at = mapped();
    busy(s);
    simcuda_destroy_primary_context();
    FAILS(CONTEXT_IS_DESTROYED, cuMemsetD8Async(at, 0, 1, s));
    FAILS(CONTEXT_IS_DESTROYED, cuStreamSynchronize(s));
    OK(cuMemUnmap(at, kGranule));  // addresses and granules belong to the process, not the context
    CHECK(violations() == 0);
  }
}

TEST(context_errors_are_permanent) {
  begin();
  const CUstream s = stream();
  const CUevent e = event();
  const CUdeviceptr at = mapped();
  simcuda_break_context(CUDA_ERROR_LAUNCH_FAILED);
  FAILS(LAUNCH_FAILED, cuMemsetD8Async(at, 0, 1, s));
  FAILS(LAUNCH_FAILED, cuStreamSynchronize(s));
  FAILS(LAUNCH_FAILED, cuEventQuery(e));
  FAILS(LAUNCH_FAILED, cuStreamDestroy_v2(s));  // the stream is destroyed all the same
  FAILS(INVALID_HANDLE, cuStreamDestroy_v2(s));
  FAILS(LAUNCH_FAILED, cuEventDestroy_v2(e));
  OK(cuMemUnmap(at, kGranule));
}

TEST(faults_are_chosen_by_function_and_count) {
  begin();
  simcuda_clear_faults();
  simcuda_fault("cuMemUnmap", 2, 3, CUDA_ERROR_UNKNOWN);
  const CUdeviceptr at = mapped();
  OK(cuMemUnmap(at, kGranule));
  const CUdeviceptr again = mapped();
  FAILS(UNKNOWN, cuMemUnmap(again, kGranule));
  FAILS(UNKNOWN, cuMemUnmap(again, kGranule));
  OK(cuMemUnmap(again, kGranule));
  CHECK(simcuda_calls("cuMemUnmap") == 4 && simcuda_injected() == 2);
  CHECK(std::string(simcuda_last_fault()) == "cuMemUnmap");
  simcuda_clear_faults();
  simcuda_fault(nullptr, 2, 2, CUDA_ERROR_OUT_OF_MEMORY);
  OK(cuCtxSynchronize());
  FAILS(OUT_OF_MEMORY, cuCtxSynchronize());
  OK(cuCtxSynchronize());
  CHECK(simcuda_calls(nullptr) == 3);
}
