// Stream capture in the simulated driver: calls that a capture forbids to each thread, the effect
// of such calls on the capture, and the memory that a replayed graph accesses.
#include <functional>
#include <thread>

#include "simcuda_fixtures.h"

using namespace simcuda_test;

namespace {

constexpr auto kGlobal = CU_STREAM_CAPTURE_MODE_GLOBAL;
constexpr auto kLocal = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
constexpr auto kRelaxed = CU_STREAM_CAPTURE_MODE_RELAXED;

CUcontext context = nullptr;

void in_thread(CUstreamCaptureMode mode, const std::function<void()>& body) {
  std::thread([&] {
    OK(cuCtxSetCurrent(context));
    OK(cuThreadExchangeStreamCaptureMode(&mode));
    CHECK(mode == kGlobal);  // the initial mode of each thread
    body();
  }).join();
}

CUgraphExec instantiate(CUgraph graph) {
  CUgraphExec exec = nullptr;
  OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
  OK(cuGraphDestroy(graph));
  return exec;
}

}  // namespace

TEST(the_modes_of_both_threads_decide_whether_an_unsafe_call_poisons) {
  context = begin();
  const CUevent e = event();
  const CUstream s = stream(), other = stream();
  const auto unsafe = [&] { return cuEventQuery(e); };
  struct Case {
    CUstreamCaptureMode capture, thread;
    bool own, poisons;
  };
  for (const Case c :
       {Case{kGlobal, kGlobal, true, true}, Case{kLocal, kGlobal, true, true},
        Case{kRelaxed, kGlobal, true, false}, Case{kGlobal, kGlobal, false, true},
        Case{kLocal, kGlobal, false, false}, Case{kRelaxed, kGlobal, false, false},
        Case{kGlobal, kLocal, false, false}, Case{kGlobal, kRelaxed, false, false}}) {
    OK(cuStreamBeginCapture_v2(s, c.capture));
    const CUresult expected = c.poisons ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
    if (c.own) {
      CHECK(unsafe() == expected);
    } else {
      in_thread(c.thread, [&] { CHECK(unsafe() == expected); });
    }
    CUstreamCaptureStatus status{};
    OK(cuStreamIsCapturing(s, &status));
    CHECK(status ==
          (c.poisons ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE));
    CUgraph graph = nullptr;
    CHECK(cuStreamEndCapture(s, &graph) ==
          (c.poisons ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS));
    CHECK((graph == nullptr) == c.poisons);
  }
  // Work on other streams and memory management are safe.
  OK(cuStreamBeginCapture_v2(s, kGlobal));
  in_thread(kGlobal, [&] {
    const CUdeviceptr at = mapped();
    OK(cuMemsetD8Async(at, 1, 8, other));
    OK(cuEventRecord(e, other));
  });
  CUgraph graph = nullptr;
  OK(cuStreamEndCapture(s, &graph));
}

TEST(some_calls_conflict_with_a_capture_in_any_mode) {
  context = begin();
  CUstreamCaptureMode mode = kRelaxed;
  OK(cuThreadExchangeStreamCaptureMode(&mode));
  const CUdeviceptr at = mapped();
  const CUstream s = stream(CU_STREAM_DEFAULT), other = stream();
  const CUevent e = event(), outside = event();
  OK(cuEventRecord(outside, other));
  const auto poisoned_by = [&](CUresult expected, const std::function<CUresult()>& call) {
    OK(cuStreamBeginCapture_v2(s, kRelaxed));
    OK(cuEventRecord(e, s));
    CHECK(call() == expected);
    CUgraph graph = nullptr;
    FAILS(STREAM_CAPTURE_INVALIDATED, cuMemsetD8Async(at, 1, 1, s));
    FAILS(STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &graph));
  };
  poisoned_by(CUDA_ERROR_CAPTURED_EVENT, [&] { return cuEventQuery(e); });
  poisoned_by(CUDA_ERROR_CAPTURED_EVENT, [&] { return cuEventSynchronize(e); });
  poisoned_by(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuStreamQuery(s); });
  poisoned_by(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuStreamSynchronize(s); });
  poisoned_by(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuCtxSynchronize(); });
  poisoned_by(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
              [&] { return cuMemsetD8Async(at, 1, 1, CU_STREAM_LEGACY); });
  poisoned_by(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, [&] {
    unsigned char byte = 0;
    return cuMemcpyHtoD_v2(at, &byte, 1);
  });
  poisoned_by(CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
              [&] { return cuStreamWaitEvent(s, outside, 0); });
  poisoned_by(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, [&] {
    CUgraph graph = nullptr;
    OK(cuStreamWaitEvent(other, e, 0));
    return cuStreamEndCapture(other, &graph);
  });
  // The legacy stream ignores a capture of a non-blocking stream.
  CUgraph graph = nullptr;
  OK(cuStreamBeginCapture_v2(other, kRelaxed));
  OK(cuMemsetD8Async(at, 1, 1, CU_STREAM_LEGACY));
  OK(cuStreamEndCapture(other, &graph));
  FAILS(ILLEGAL_STATE, cuStreamEndCapture(other, &graph));
  FAILS(CAPTURED_EVENT, cuEventQuery(e));  // also after the capture
  OK(cuEventRecord(e, s));
  OK(cuEventSynchronize(e));
}

TEST(forks_must_join) {
  context = begin();
  const CUstream s = stream(), t = stream();
  const CUevent fork = event(), join = event();
  const CUdeviceptr at = mapped();
  for (const bool joined : {false, true}) {
    OK(cuStreamBeginCapture_v2(s, kGlobal));
    OK(cuEventRecord(fork, s));
    OK(cuStreamWaitEvent(t, fork, 0));
    OK(cuMemsetD8Async(at, 6, 8, t));
    OK(cuEventRecord(join, t));
    if (joined) OK(cuStreamWaitEvent(s, join, 0));
    CUgraph graph = nullptr;
    CHECK(cuStreamEndCapture(s, &graph) ==
          (joined ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
    CUstreamCaptureStatus status{};
    OK(cuStreamIsCapturing(t, &status));
    CHECK(status == CU_STREAM_CAPTURE_STATUS_NONE);
    if (!joined) continue;
    OK(cuGraphLaunch(instantiate(graph), s));
    OK(cuStreamSynchronize(s));
    CHECK(holds(at, 8, 6));
  }
  // Only the thread that began a capture may end it, except for relaxed captures.
  CUgraph graph = nullptr;
  OK(cuStreamBeginCapture_v2(s, kGlobal));
  in_thread(kGlobal, [&] {
    CUgraph none = nullptr;
    FAILS(STREAM_CAPTURE_WRONG_THREAD, cuStreamEndCapture(s, &none));
  });
  OK(cuStreamEndCapture(s, &graph));
  OK(cuStreamBeginCapture_v2(s, kRelaxed));
  in_thread(kGlobal, [&] { OK(cuStreamEndCapture(s, &graph)); });
}

TEST(graphs_keep_addresses) {
  for (const char* clock : {"clock=real", "clock=virtual"}) {
    context = begin(clock);
    const CUstream s = stream();
    const CUdeviceptr at = reserve(), out = mapped();
    const auto old_granule = create(), new_granule = create();
    map(at, old_granule);
    OK(cuMemsetD8Async(at, 1, 64, s));
    CUgraph graph = nullptr;
    int called = 0;
    OK(cuStreamBeginCapture_v2(s, kGlobal));
    OK(cuMemcpyDtoDAsync_v2(out, at, 64, s));
    OK(cuLaunchHostFunc(s, [](void* count) { ++*static_cast<int*>(count); }, &called));
    OK(cuStreamEndCapture(s, &graph));
    const CUgraphExec exec = instantiate(graph);
    CHECK(called == 0);
    OK(cuGraphLaunch(exec, s));
    OK(cuStreamSynchronize(s));
    CHECK(called == 1 && holds(out, 64, 1));

    OK(cuMemUnmap(at, kGranule));
    map(at, new_granule);
    OK(cuMemsetD8Async(at, 2, 64, s));
    OK(cuGraphLaunch(exec, s));
    OK(cuStreamSynchronize(s));
    CHECK(called == 2 && holds(out, 64, 2));
    CHECK(violations() == 0);

    OK(cuMemUnmap(at, kGranule));
    OK(cuGraphLaunch(exec, s));
    FAILS(LAUNCH_FAILED, cuStreamSynchronize(s));
    CHECK(called == 2);
    CHECK(violations("use-while-unmapped") == 1);
  }
}
