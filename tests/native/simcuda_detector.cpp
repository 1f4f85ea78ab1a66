// The race detector, compared with a brute-force computation of happens-before: two accesses of a
// random program are ordered if a path of documented edges leads from one to the other.
#include <random>
#include <set>

#include "simcuda_fixtures.h"

using namespace simcuda_test;

namespace {

constexpr int kStreams = 5;  // 0: legacy; 1, 2: blocking; 3, 4: non-blocking
constexpr int kEvents = 4, kBytes = 48;

bool is_blocking(int s) { return s == 1 || s == 2; }

struct Access {
  int begin, end;
  bool write;
};
struct Step {
  std::vector<Access> accesses;
  std::vector<bool> before;  // by index of a step: whether it is ordered before this one
};

class Program {
 public:
  explicit Program(unsigned seed) : random_(seed) {
    begin("clock=virtual\ncontent=64\nh2d=1e6\nd2h=1e6\nd2d=1e6\n");
    granules_ = {create(), create()};
    // The same two granules are mapped at two addresses, in opposite orders.
    first_ = reserve(2 * kGranule);
    second_ = reserve(2 * kGranule);
    for (int i = 0; i < 2; ++i) {
      map(first_ + i * kGranule, granules_[i]);
      map(second_ + i * kGranule, granules_[1 - i]);
    }
    host_ = pinned(kBytes);
    streams_ = {nullptr, stream(CU_STREAM_DEFAULT), stream(CU_STREAM_DEFAULT), stream(), stream()};
    for (int i = 0; i < kEvents; ++i) events_.push_back(event());
    OK(cuMemsetD8Async(first_, 0, 2 * kGranule, streams_[3]));
    OK(cuStreamSynchronize(streams_[3]));
    recorded_.assign(kEvents, -1);
  }

  void run(int length) {
    for (int i = 0; i < length; ++i) step();
    std::set<std::uint64_t> found;
    const std::string text = report();
    const std::string key = "\"call\": ";
    for (std::size_t at = text.find("{\"kind\": \"race"); at != std::string::npos;
         at = text.find("{\"kind\": \"race", at + 1))
      CHECK(found.insert(std::stoull(text.substr(text.find(key, at) + key.size()))).second);
    CHECK(found == expected_);
    CHECK(violations() == static_cast<int>(expected_.size()));
    races += found.size();
  }

  static inline std::size_t races = 0;

 private:
  int pick(int below) { return static_cast<int>(random_() % static_cast<unsigned>(below)); }

  // The first kBytes of each of the two granules form one space of 2 * kBytes.
  struct Place {
    CUdeviceptr address;
    int at;
  };
  Place place(int bytes) {
    const int granule = pick(2), offset = pick(kBytes - bytes + 1);
    const CUdeviceptr base =
        pick(2) ? first_ + granule * kGranule : second_ + (1 - granule) * kGranule;
    return {base + static_cast<unsigned>(offset), granule * 1000 + offset};
  }

  // Adds a step of the stream. It follows the stream's earlier steps and the steps that the host
  // has waited for.
  int add(int s, std::vector<Access> accesses, int also = -1) {
    Step made{std::move(accesses), std::vector<bool>(steps_.size())};
    const auto after = [&](int other) {
      made.before[other] = true;
      for (std::size_t i = 0; i < steps_[other].before.size(); ++i)
        if (steps_[other].before[i]) made.before[i] = true;
    };
    for (int i = 0; i < static_cast<int>(steps_.size()); ++i) {
      const int other = stream_of_[i];
      if (other == s || host_knows_.contains(i) || (s == 0 && is_blocking(other)) ||
          (is_blocking(s) && other == 0))
        after(i);
    }
    if (also >= 0) after(also);
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      if (made.before[i]) continue;
      for (const Access& a : steps_[i].accesses)
        for (const Access& b : made.accesses)
          if (a.begin < b.end && b.begin < a.end && (a.write || b.write))
            expected_.insert(simcuda_calls(nullptr));  // the number of the last call
    }
    steps_.push_back(std::move(made));
    stream_of_.push_back(s);
    return static_cast<int>(steps_.size()) - 1;
  }

  void host_knows(int step) {
    host_knows_.insert(step);
    for (std::size_t i = 0; i < steps_[step].before.size(); ++i)
      if (steps_[step].before[i]) host_knows_.insert(static_cast<int>(i));
  }

  void step() {
    const int s = pick(kStreams), e = pick(kEvents), bytes = 1 + pick(12);
    const CUstream stream = streams_[s];
    const Place to = place(bytes), from = place(bytes);
    const int host = pick(kBytes - bytes);
    const Access write{to.at, to.at + bytes, true}, read{from.at, from.at + bytes, false};
    const std::size_t n = static_cast<std::size_t>(bytes);
    switch (pick(12)) {
      case 0:
      case 1:
        OK(cuMemsetD8Async(to.address, 1, n, stream));
        add(s, {write});
        break;
      case 2:
      case 3:
        OK(cuMemcpyHtoDAsync_v2(to.address, host_ + host, n, stream));
        add(s, {write, {5000 + host, 5000 + host + bytes, false}});
        break;
      case 4:
      case 5:
        OK(cuMemcpyDtoHAsync_v2(host_ + host, from.address, n, stream));
        add(s, {read, {5000 + host, 5000 + host + bytes, true}});
        break;
      case 6:
        if (std::abs(to.at - from.at) < bytes) break;
        OK(cuMemcpyDtoDAsync_v2(to.address, from.address, n, stream));
        add(s, {write, read});
        break;
      case 7:
      case 8:
        OK(cuEventRecord(events_[e], stream));
        recorded_[e] = add(s, {});
        break;
      case 9:
      case 10:
        OK(cuStreamWaitEvent(stream, events_[e], 0));
        if (recorded_[e] >= 0) add(s, {}, recorded_[e]);
        break;
      default: host_waits(s, e);
    }
  }

  void host_waits(int s, int e) {
    switch (pick(4)) {
      case 0:
        if (cuEventQuery(events_[e]) == CUDA_SUCCESS && recorded_[e] >= 0) host_knows(recorded_[e]);
        break;
      case 1:
        OK(cuEventSynchronize(events_[e]));
        if (recorded_[e] >= 0) host_knows(recorded_[e]);
        break;
      case 2:
        OK(cuStreamSynchronize(streams_[s]));
        if (s == 0) add(s, {});
        for (int i = 0; i < static_cast<int>(steps_.size()); ++i)
          if (stream_of_[i] == s) host_knows(i);
        break;
      default: {
        // Replace the stream. The detector may reuse its number.
        if (s < 3) break;
        OK(cuStreamDestroy_v2(streams_[s]));
        streams_[s] = stream();
        for (int& of : stream_of_)
          if (of == s) of = -1;
      }
    }
  }

  std::mt19937 random_;
  std::vector<CUmemGenericAllocationHandle> granules_;
  CUdeviceptr first_ = 0, second_ = 0;
  unsigned char* host_ = nullptr;
  std::vector<CUstream> streams_;
  std::vector<CUevent> events_;
  std::vector<Step> steps_;
  std::vector<int> stream_of_;  // -1: destroyed
  std::vector<int> recorded_;   // the step that recorded each event last
  std::set<int> host_knows_;
  std::set<std::uint64_t> expected_;
};

}  // namespace

TEST(random_programs_agree_with_brute_force) {
  for (unsigned seed = 0; seed < 3000; ++seed) Program(seed).run(10 + static_cast<int>(seed % 40));
  CHECK(Program::races > 10'000);
}

TEST(a_use_that_is_waited_for_is_no_violation) {
  begin("clock=virtual\nh2d=1e9\n");
  const CUstream s = stream(), t = stream();
  const CUevent e = event();
  unsigned char* const host = pinned(64);
  for (int way = 0; way < 5; ++way) {
    const CUdeviceptr at = mapped();
    OK(cuMemcpyHtoDAsync_v2(at, host, 64, s));
    OK(cuEventRecord(e, s));
    OK(cuStreamWaitEvent(t, e, 0));
    if (way == 0) OK(cuStreamSynchronize(s));
    if (way == 1) OK(cuEventSynchronize(e));
    if (way == 2) OK(cuStreamSynchronize(t));
    if (way == 3) OK(cuCtxSynchronize());
    while (way == 4 && cuEventQuery(e) == CUDA_ERROR_NOT_READY) {
    }
    OK(set_access(at, kGranule, CU_MEM_ACCESS_FLAGS_PROT_READ));
    OK(cuMemUnmap(at, kGranule));
  }
  CHECK(violations() == 0);
}

TEST(taking_memory_in_use_is_a_violation) {
  begin("clock=virtual\nh2d=1e9\n");
  const CUstream s = stream(), t = stream();
  const CUevent e = event();
  const auto handle = create();
  const CUdeviceptr at = reserve(), alias = reserve();
  map(at, handle);
  map(alias, handle);
  OK(cuMemsetD8Async(at, 0, kGranule, s));
  OK(cuEventRecord(e, s));
  OK(cuStreamWaitEvent(t, e, 0));   // a wait of a stream is not a wait of the host
  OK(cuMemUnmap(alias, kGranule));  // legal: this mapping was not used
  CHECK(violations() == 0);
  OK(set_access(at, kGranule));
  CHECK(violations("use-while-unmapped") == 1);
  OK(cuStreamSynchronize(s));

  std::vector<unsigned char> registered(8192);
  OK(cuMemHostRegister_v2(registered.data(), 8192, 0));
  OK(cuMemcpyHtoDAsync_v2(at, registered.data(), 8192, s));
  CUdeviceptr plain = 0;
  OK(cuMemAlloc_v2(&plain, 1000));
  OK(cuMemsetD8Async(plain, 0, 1000, t));
  OK(cuMemFree_v2(plain));  // waits, although that is not documented
  CHECK(violations("use-while-unmapped") == 2);
  unsigned char* const allocated = pinned(4096);
  OK(cuMemcpyDtoHAsync_v2(allocated, at, 4096, s));
  OK(cuMemFreeHost(allocated));
  CHECK(violations("use-while-unmapped") == 3);
  OK(cuMemHostUnregister(registered.data()));
  CHECK(violations("use-while-unmapped") == 4);
  CHECK(violations() == 4);
}

TEST(reading_unwritten_bytes_is_a_violation) {
  begin("clock=virtual\n");
  const CUdeviceptr at = mapped(2 * kGranule);
  unsigned char host[256];
  OK(cuMemsetD8_v2(at + kGranule - 50, 1, 100));
  OK(cuMemsetD8_v2(at + kGranule + 60, 1, 10));
  OK(cuMemcpyDtoH_v2(host, at + kGranule - 50, 100));
  CHECK(violations() == 0);
  OK(cuMemcpyDtoH_v2(host, at + kGranule - 51, 10));
  OK(cuMemcpyDtoH_v2(host, at + kGranule + 45, 20));
  CHECK(violations("uninitialised-read") == 2);
  OK(cuMemsetD8_v2(at + kGranule + 50, 1, 10));
  OK(cuMemcpyDtoH_v2(host, at + kGranule - 50, 120));
  CHECK(violations("uninitialised-read") == 2);
  // The content of an earlier allocation does not count as written for the next one.
  OK(cuMemUnmap(at, 2 * kGranule));
  OK(cuMemcpyDtoH_v2(host, mapped(), 1));
  CHECK(violations("uninitialised-read") == 3);
}

TEST(graphs_are_ordered_by_their_edges) {
  begin("clock=virtual\nd2d=1e9\n");
  const CUstream s = stream(), t = stream();
  const CUevent fork = event(), join = event();
  const CUdeviceptr at = mapped();
  const auto graph = [&](bool wait_before_last) {
    CUgraph made = nullptr;
    CUgraphExec exec = nullptr;
    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_RELAXED));
    OK(cuEventRecord(fork, s));
    OK(cuStreamWaitEvent(t, fork, 0));
    OK(cuMemsetD8Async(at, 1, 8, t));
    OK(cuEventRecord(join, t));
    if (wait_before_last) OK(cuStreamWaitEvent(s, join, 0));
    OK(cuMemsetD8Async(at + 4, 2, 8, s));
    if (!wait_before_last) OK(cuStreamWaitEvent(s, join, 0));
    OK(cuStreamEndCapture(s, &made));
    OK(cuGraphInstantiateWithFlags(&exec, made, 0));
    OK(cuGraphDestroy(made));
    return exec;
  };
  const CUgraphExec good = graph(true), bad = graph(false);
  OK(cuGraphLaunch(good, s));
  OK(cuGraphLaunch(good, t));  // ordered after the launch before
  CHECK(violations() == 0);
  OK(cuCtxSynchronize());
  CHECK(holds(at, 4, 1) && holds(at + 4, 8, 2));
  OK(cuGraphLaunch(bad, s));
  CHECK(violations("race") == 1);  // one per call
  OK(cuMemsetD8Async(at, 3, 1, t));
  CHECK(violations("race") == 2);
  OK(cuMemsetD8Async(at, 3, 1, s));
  CHECK(violations("race") == 3);  // races with the memset in t
}
