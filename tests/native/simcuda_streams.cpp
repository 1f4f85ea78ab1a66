// Order and time in the simulated driver, with threads and with the virtual clock: the order of
// operations, the time at which memory is read, and the effect of waits.
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "simcuda_fixtures.h"

using namespace simcuda_test;

namespace {

constexpr const char* kClocks[] = {"clock=real\n", "clock=virtual\n"};
// A copy of a granule to the device takes 20 ms.
const std::string kSlow = "h2d=" + std::to_string(kGranule * 50) + "\n";

void busy(CUstream s) { OK(cuMemcpyHtoDAsync_v2(mapped(), pinned(kGranule), kGranule, s)); }

}  // namespace

TEST(pinned_memory_is_read_late_and_pageable_at_the_call) {
  for (const std::string clock : kClocks) {
    begin(clock + kSlow);
    const CUstream s = stream();
    busy(s);
    const CUdeviceptr late = mapped(), early = mapped();
    unsigned char* const source = pinned(64, 1);
    unsigned char pageable[64];
    std::memset(pageable, 1, 64);
    OK(cuMemcpyHtoDAsync_v2(late, source, 64, s));
    OK(cuMemcpyHtoDAsync_v2(early, pageable, 64, s));
    CHECK(cuStreamQuery(s) == CUDA_ERROR_NOT_READY);
    std::memset(source, 2, 64);
    std::memset(pageable, 2, 64);
    OK(cuStreamSynchronize(s));
    CHECK(holds(late, 64, 2));
    CHECK(holds(early, 64, 1));
  }
}

TEST(a_wait_keeps_the_recorded_position_of_its_event) {
  for (const std::string clock : kClocks) {
    begin(clock + kSlow);
    const CUstream first = stream(), second = stream(), third = stream();
    const CUevent e = event();
    OK(cuEventQuery(e));  // an event that was never recorded is complete
    OK(cuEventRecord(e, first));
    OK(cuStreamWaitEvent(second, e, 0));
    OK(cuEventSynchronize(e));
    busy(third);
    OK(cuEventRecord(e, third));
    CHECK(cuEventQuery(e) == CUDA_ERROR_NOT_READY);
    const CUdeviceptr at = mapped();
    OK(cuMemsetD8Async(at, 3, 64, second));
    OK(cuStreamSynchronize(second));  // does not wait for the third stream
    CHECK(cuEventQuery(e) == CUDA_ERROR_NOT_READY);
    CHECK(holds(at, 64, 3));
    OK(cuEventDestroy_v2(e));  // while it is pending
    OK(cuStreamSynchronize(third));
  }
}

TEST(the_legacy_stream_waits_and_is_waited_for) {
  for (const std::string clock : kClocks) {
    begin(clock + kSlow);
    const CUstream blocking = stream(CU_STREAM_DEFAULT), apart = stream();
    const CUdeviceptr at = mapped();
    unsigned char* const host = pinned(4);
    busy(blocking);
    OK(cuMemsetD8Async(at, 1, 4, nullptr));
    OK(cuMemsetD8Async(at + 8, 1, 4, apart));
    OK(cuStreamSynchronize(apart));
    // Not ready, because the legacy memset has not run.
    CHECK(cuStreamQuery(blocking) == CUDA_ERROR_NOT_READY);
    OK(cuMemcpyDtoHAsync_v2(host, at, 4, blocking));
    OK(cuStreamSynchronize(blocking));
    CHECK(host[0] == 1 && host[3] == 1);
    busy(blocking);
    CHECK(cuStreamQuery(nullptr) == CUDA_ERROR_NOT_READY);
    OK(cuStreamSynchronize(nullptr));
    OK(cuStreamQuery(blocking));
    CHECK(violations() == 0);
  }
}

TEST(host_functions_run_in_order_and_may_not_call_cuda) {
  for (const std::string clock : kClocks) {
    begin(clock + kSlow);
    const CUstream s = stream();
    struct State {
      CUdeviceptr at;
      bool before = false, refused = false;
    } state{mapped()};
    busy(s);
    OK(cuMemsetD8Async(state.at, 9, 1, s));
    OK(cuLaunchHostFunc(
        s,
        [](void* data) {
          auto& state = *static_cast<State*>(data);
          state.before = holds(state.at, 1, 9);
          int count = 0;
          state.refused = cuDeviceGetCount(&count) == CUDA_ERROR_NOT_PERMITTED;
        },
        &state));
    CHECK(!state.before);
    OK(cuStreamSynchronize(s));
    CHECK(state.before && state.refused);
  }
}

TEST(destroyed_streams_finish_their_work) {
  for (const std::string clock : kClocks) {
    begin(clock + kSlow);
    const CUdeviceptr at = mapped();
    const CUstream s = stream();
    busy(s);
    OK(cuMemsetD8Async(at, 4, 64, s));
    OK(cuStreamDestroy_v2(s));
    FAILS(INVALID_HANDLE, cuStreamDestroy_v2(s));
    FAILS(INVALID_HANDLE, cuMemsetD8Async(at, 4, 64, s));
    OK(cuCtxSynchronize());
    CHECK(holds(at, 64, 4));
    OK(cuMemUnmap(at, kGranule));
    CHECK(violations() == 0);
  }
}

TEST(work_on_memory_unmapped_too_early_dies_when_it_runs) {
  for (const std::string clock : kClocks) {
    begin(clock + kSlow);
    const CUstream s = stream();
    const CUdeviceptr at = mapped();
    busy(s);
    OK(cuMemsetD8Async(at, 4, 64, s));
    OK(cuMemUnmap(at, kGranule));
    CHECK(violations("use-while-unmapped") == 1);
    FAILS(ILLEGAL_ADDRESS, cuStreamSynchronize(s));
    CHECK(violations("use-while-unmapped") == 2);
    CUstream none = nullptr;
    FAILS(ILLEGAL_ADDRESS, cuStreamCreate(&none, 0));
  }
}

// The virtual clock is exact.
TEST(virtual_time_is_exact) {
  begin("clock=virtual\nh2d=1e9\nd2h=5e8\ncost.cuMemcpyHtoDAsync=2+1\ncost.cuMemUnmap=10+100\n");
  const CUstream one = stream(), two = stream();
  const CUdeviceptr at = mapped(3 * kGranule);
  unsigned char* const host = pinned(3 * kGranule);
  const double copy = kGranule / 1e9;
  const auto close = [](double a, double b) { return std::abs(a - b) < 2e-9; };

  double begun = simcuda_now();
  OK(cuMemcpyHtoDAsync_v2(at, host, kGranule, one));
  CHECK(close(simcuda_now() - begun, 3e-6));  // only the cost of the call
  OK(cuMemcpyHtoDAsync_v2(at + kGranule, host + kGranule, kGranule, two));
  OK(cuStreamSynchronize(two));  // the copies run one after the other: they share an engine
  CHECK(close(simcuda_now() - begun, 3e-6 + 2 * copy));

  begun = simcuda_now();
  OK(cuMemcpyHtoDAsync_v2(at + 2 * kGranule, host, kGranule, one));
  OK(cuMemcpyDtoHAsync_v2(host + kGranule, at, kGranule, two));
  OK(cuCtxSynchronize());  // different engines run concurrently
  CHECK(close(simcuda_now() - begun, 3e-6 + 2 * copy));

  // The engine is free while a copy that was enqueued first waits for an event.
  const CUevent e = event(CU_EVENT_DEFAULT), f = event(CU_EVENT_DEFAULT);
  begun = simcuda_now();
  OK(cuMemcpyDtoHAsync_v2(host + kGranule, at, kGranule, two));
  OK(cuEventRecord(e, two));
  OK(cuStreamWaitEvent(one, e, 0));
  OK(cuMemcpyHtoDAsync_v2(at + 2 * kGranule, host, kGranule, one));
  const CUstream three = stream();
  OK(cuMemcpyHtoDAsync_v2(at + kGranule, host, kGranule, three));
  OK(cuEventRecord(f, three));
  OK(cuEventSynchronize(f));
  CHECK(close(simcuda_now() - begun, 6e-6 + copy));
  OK(cuCtxSynchronize());
  CHECK(close(simcuda_now() - begun, 3 * copy));
  float milliseconds = 0;
  OK(cuEventElapsedTime(&milliseconds, f, e));
  CHECK(std::abs(milliseconds - (copy - 6e-6) * 1e3) < 1e-3);

  begun = simcuda_now();
  OK(cuMemUnmap(at, 3 * kGranule));
  CHECK(close(simcuda_now() - begun, 110e-6));  // the cost of one mapping
  // Polling advances the clock.
  OK(cuMemcpyDtoHAsync_v2(host, mapped(), kGranule, two));
  begun = simcuda_now();
  int polls = 0;
  while (cuStreamQuery(two) == CUDA_ERROR_NOT_READY) ++polls;
  CHECK(polls == static_cast<int>(std::ceil(2 * copy / 10e-6)));
}

TEST(real_time_is_at_least_the_given_cost) {
  begin("h2d=1e8\ncost.cuMemCreate=3000\n");
  const CUstream one = stream(), two = stream();
  const CUdeviceptr at = mapped();
  unsigned char* const host = pinned(kGranule);
  double begun = simcuda_now();
  OK(cuMemcpyHtoDAsync_v2(at, host, kGranule / 2, one));
  OK(cuMemcpyHtoDAsync_v2(at + kGranule / 2, host, kGranule / 2, two));
  OK(cuCtxSynchronize());
  CHECK(simcuda_now() - begun >= kGranule / 1e8 * 0.99);
  begun = simcuda_now();
  create();
  CHECK(simcuda_now() - begun >= 3e-3);
}

TEST(threads_can_use_one_context) {
  for (const std::string clock : kClocks) {
    const CUcontext context = begin(clock + "h2d=1e9\n");
    std::vector<std::thread> threads;
    std::atomic<int> done = 0;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        OK(cuCtxSetCurrent(context));
        const CUstream s = stream();
        const CUevent e = event();
        unsigned char* const host = pinned(4096, static_cast<unsigned char>(t));
        for (int i = 0; i < 50; ++i) {
          const CUdeviceptr at = mapped();
          OK(cuMemcpyHtoDAsync_v2(at, host, 4096, s));
          OK(cuEventRecord(e, s));
          if (i % 2) {
            OK(cuEventSynchronize(e));
          } else {
            while (cuEventQuery(e) == CUDA_ERROR_NOT_READY) std::this_thread::yield();
          }
          CHECK(holds(at, 4096, static_cast<unsigned char>(t)));
          OK(cuMemUnmap(at, kGranule));
          OK(cuMemAddressFree(at, kGranule));
        }
        OK(cuStreamDestroy_v2(s));
        OK(cuEventDestroy_v2(e));
        OK(cuMemFreeHost(host));
        ++done;
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(done == 4);
    CHECK(violations() == 0);
    OK(cuDevicePrimaryCtxRelease_v2(0));
    simcuda_check_leaks();
    CHECK(violations() == 0);
  }
}

// While cuMemFree waits, other threads wait for other work. The detector must not lose their waits.
TEST(a_waiting_free_keeps_the_waits_of_other_threads) {
  const CUcontext context = begin(kSlow);
  const CUstream slow = stream();
  unsigned char* const unused = pinned(64);
  const CUdeviceptr at = mapped();
  busy(slow);
  std::atomic<bool> freeing = false;
  std::thread other([&] {
    OK(cuCtxSetCurrent(context));
    const CUstream s = stream();
    while (!freeing) std::this_thread::yield();
    ::usleep(3000);  // the free waits for the slow stream
    OK(cuMemsetD8Async(at, 1, 64, s));
    OK(cuStreamSynchronize(s));
  });
  freeing = true;
  OK(cuMemFreeHost(unused));
  other.join();
  OK(cuMemUnmap(at, kGranule));
  CHECK(violations() == 0);
  OK(cuStreamSynchronize(slow));
}

TEST(a_program_that_never_waits_loses_its_bytes) {
  begin(kSlow);
  const CUstream s = stream();
  const CUdeviceptr at = mapped();
  unsigned char* const staging = pinned(kGranule, 1);
  OK(cuMemcpyHtoDAsync_v2(at, staging, kGranule, s));
  ::usleep(1000);
  std::memset(staging, 2, kGranule);  // too early: the copy still reads
  OK(cuStreamSynchronize(s));
  CHECK(!holds(at, kGranule, 1));
}
