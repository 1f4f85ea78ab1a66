// What streams do: the operations of a stream, and graphs of them.
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
  // The content of a pageable source, as it was at the call.
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
  CUresult broken = CUDA_SUCCESS;  // what a launch with these parameters dies of
};
struct Callback {
  CUhostFn function = nullptr;                 // of cuLaunchHostFunc, or
  CUstreamCallback stream_function = nullptr;  // of cuStreamAddCallback
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
  std::uint64_t call = 0;                         // the number of the cu* call
  std::vector<std::shared_ptr<Operation>> after;  // besides what is before it in its stream
  std::uint64_t sequence = 0;
  Nanoseconds end = 0;  // when it is done; virtual clock: known from the start
  bool races = false;   // with an earlier one, as the detector found
  bool done = false;
};
using OperationPtr = std::shared_ptr<Operation>;

// The nodes that a captured stream made are one chain: each comes after the one before it.
struct Node {
  Work work;
  std::vector<std::uint32_t> after;  // earlier nodes
  std::uint32_t chain = 0;
};
struct Graph {
  std::vector<Node> nodes;
  std::uint32_t chains = 0;
};

// The memory an operation touches, reads before writes. For a gather, row by row.
struct Touch {
  Address address;
  std::uint64_t bytes;
  bool write;
};
void touches(const Work& work, std::vector<Touch>* out);

}  // namespace warmserve::simcuda
