// The operations of a stream, and graphs of operations.
#pragma once

#include <memory>
#include <variant>
#include <vector>

#include "kernels/kernels.h"
#include "simcuda/memory.h"

namespace warmserve::simcuda {

struct Context;
struct Graph;

struct Copy {
  Address to = 0, from = 0;
  std::uint64_t bytes = 0;
  Place to_place{}, from_place{};
  // The content of a pageable source at the time of the call.
  std::shared_ptr<const std::vector<std::byte>> snapshot;

  Engine engine() const {
    if (to_place != Place::device) return Engine::d2h;
    return from_place == Place::device ? Engine::d2d : Engine::h2d;
  }
};
struct Fill {
  Address to = 0;
  Place place{};
  std::uint64_t bytes = 0;
  unsigned width = 1;
  std::uint32_t value = 0;
};
struct Launch {
  KernelCall call;
  CUresult broken = CUDA_SUCCESS;  // the error of a launch with invalid parameters
};
struct Callback {
  CUhostFn function = nullptr;                 // set by cuLaunchHostFunc
  CUstreamCallback stream_function = nullptr;  // set by cuStreamAddCallback
  CUstream stream = nullptr;
  void* data = nullptr;
};
struct Marker {};  // a position in a stream
// With the real clock a graph is one operation that runs its nodes in order.
struct GraphRun {
  std::shared_ptr<const Graph> graph;
};
using Work = std::variant<Marker, Copy, Fill, Launch, Callback, GraphRun>;

struct Operation {
  Work work;
  Context* context = nullptr;
  std::uint64_t call = 0;  // number of the cu* call
  std::vector<std::shared_ptr<Operation>>
      after;  // in addition to the operations before it in its stream
  std::uint64_t sequence = 0;
  Nanoseconds end = 0;  // time of completion; virtual clock: known from the start
  bool races = false;   // with an earlier operation, as the detector found
  bool done = false;
};
using OperationPtr = std::shared_ptr<Operation>;

// A node of a graph. The nodes made by one captured stream form a chain: each follows the one
// before.
struct Node {
  Work work;
  std::vector<std::uint32_t> after;  // earlier nodes
  std::uint32_t chain = 0;
};
struct Graph {
  std::vector<Node> nodes;
  std::uint32_t chains = 0;
};

// A memory access of an operation. Reads are listed before writes; a gather is listed row by row.
struct Touch {
  Address address;
  std::uint64_t bytes;
  bool write;
};
void touches(const Work& work, std::vector<Touch>* out);

}  // namespace warmserve::simcuda
