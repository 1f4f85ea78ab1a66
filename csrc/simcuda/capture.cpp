#include "simcuda/capture.h"

#include <algorithm>

namespace warmserve::simcuda {
namespace {

constexpr auto kGlobal = CU_STREAM_CAPTURE_MODE_GLOBAL;
constexpr auto kRelaxed = CU_STREAM_CAPTURE_MODE_RELAXED;

void join_capture(Stream& stream, const std::shared_ptr<Capture>& capture,
                  std::vector<std::uint32_t> frontier) {
  stream.capture = capture;
  stream.frontier = std::move(frontier);
  stream.chain = capture->graph->chains++;
  capture->streams.push_back(&stream);
}

void leave(Simulator& sim, const std::shared_ptr<Capture>& capture) {
  for (Stream* const stream : capture->streams) {
    stream->capture = nullptr;
    stream->frontier.clear();
  }
  capture->streams.clear();
  capture->origin = nullptr;
  std::erase(sim.captures, capture);
}

bool is_over(const Capture& capture) { return capture.origin == nullptr; }

// Returns whether each node is in the frontier or precedes a node of it.
bool joined(const Graph& graph, const std::vector<std::uint32_t>& frontier) {
  std::vector<bool> reached(graph.nodes.size());
  for (const std::uint32_t node : frontier) reached[node] = true;
  for (std::size_t i = graph.nodes.size(); i-- > 0;) {
    if (!reached[i]) return false;
    for (const std::uint32_t before : graph.nodes[i].after) reached[before] = true;
  }
  return true;
}

}  // namespace

CUresult unsafe_call(Call& call) {
  const ThreadState& thread = this_thread();
  if (thread.mode == kRelaxed) return CUDA_SUCCESS;
  CUresult result = CUDA_SUCCESS;
  for (const auto& capture : call.sim->captures) {
    const bool own = capture->thread == thread.id && capture->mode != kRelaxed;
    const bool other = thread.mode == kGlobal && capture->mode == kGlobal;
    if (!own && !other) continue;
    capture->invalid = true;
    result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return result;
}

CUresult refuse_captured(Stream& stream) {
  if (!stream.capture) return CUDA_SUCCESS;
  stream.capture->invalid = true;
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult legacy_use(Call& call, const Stream& stream) {
  CUresult result = CUDA_SUCCESS;
  if (!stream.legacy) return result;
  for (const auto& capture : call.sim->captures) {
    const bool implied = std::any_of(
        capture->streams.begin(), capture->streams.end(),
        [&](const Stream* other) { return other->context == stream.context && other->blocking(); });
    if (!implied) continue;
    capture->invalid = true;
    result = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  return result;
}

CUresult add_node(Stream& stream, Work work) {
  Capture& capture = *stream.capture;
  if (capture.invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  const auto index = static_cast<std::uint32_t>(capture.graph->nodes.size());
  capture.graph->nodes.push_back({std::move(work), stream.frontier, stream.chain});
  stream.frontier = {index};
  return CUDA_SUCCESS;
}

bool capture_wait(Stream& stream, Event& event, CUresult* result) {
  if (!event.capture && !stream.capture) return false;
  *result = CUDA_SUCCESS;
  if (stream.capture && stream.capture->invalid) {
    *result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  } else if (!event.capture) {
    if (!event.operation) return true;  // an event that was never recorded counts as complete
    // The capture would depend on work outside of it.
    stream.capture->invalid = true;
    *result = CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  } else if (is_over(*event.capture)) {
    if (stream.capture) stream.capture->invalid = true;
    *result = CUDA_ERROR_CAPTURED_EVENT;
  } else if (event.capture->invalid) {
    *result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  } else if (stream.legacy) {
    event.capture->invalid = true;
    *result = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  } else if (stream.capture && stream.capture != event.capture) {
    stream.capture->invalid = event.capture->invalid = true;
    *result = CUDA_ERROR_STREAM_CAPTURE_MERGE;
  } else if (!stream.capture) {
    join_capture(stream, event.capture, event.frontier);
  } else {
    for (const std::uint32_t node : event.frontier)
      if (std::find(stream.frontier.begin(), stream.frontier.end(), node) == stream.frontier.end())
        stream.frontier.push_back(node);
  }
  return true;
}

bool capture_record(Stream& stream, Event& event, CUresult* result) {
  if (!stream.capture) return false;
  *result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (stream.capture->invalid) return true;
  event.capture = stream.capture;
  event.frontier = stream.frontier;
  *result = CUDA_SUCCESS;
  return true;
}

// If a graph is launched during a capture, adds its nodes to the capture.
CUresult capture_graph(Stream& stream, const Graph& graph) {
  Capture& capture = *stream.capture;
  if (capture.invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  auto& nodes = capture.graph->nodes;
  const auto first = static_cast<std::uint32_t>(nodes.size());
  std::vector<bool> is_leaf(graph.nodes.size(), true);
  for (const Node& node : graph.nodes) {
    Node copy{node.work, stream.frontier, capture.graph->chains + node.chain};
    for (const std::uint32_t before : node.after) {
      is_leaf[before] = false;
      copy.after.push_back(first + before);
    }
    nodes.push_back(std::move(copy));
  }
  capture.graph->chains += graph.chains;
  if (graph.nodes.empty()) return CUDA_SUCCESS;
  stream.frontier.clear();
  for (std::uint32_t i = 0; i < is_leaf.size(); ++i)
    if (is_leaf[i]) stream.frontier.push_back(first + i);
  return CUDA_SUCCESS;
}

void abandon_capture(Simulator& sim, Stream& stream) {
  const std::shared_ptr<Capture> capture = stream.capture;
  capture->invalid = true;
  if (capture->origin == &stream) {
    leave(sim, capture);
  } else {
    std::erase(capture->streams, &stream);
    stream.capture = nullptr;
  }
}

CUresult begin_capture(Call& call, Stream& stream, CUstreamCaptureMode mode) {
  if (stream.legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream.capture) return CUDA_ERROR_ILLEGAL_STATE;
  auto capture = std::make_shared<Capture>();
  capture->id = new_handle() / 16;
  capture->mode = mode;
  capture->thread = this_thread().id;
  capture->context = stream.context;
  capture->origin = &stream;
  capture->graph = std::make_shared<Graph>();
  join_capture(stream, capture, {});
  call.sim->captures.push_back(std::move(capture));
  return CUDA_SUCCESS;
}

CUresult end_capture(Call& call, Stream& stream, CUgraph* out) {
  const std::shared_ptr<Capture> capture = stream.capture;
  *out = nullptr;
  if (!capture) return CUDA_ERROR_ILLEGAL_STATE;
  if (capture->origin != &stream) {
    capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  }
  if (capture->mode != kRelaxed && capture->thread != this_thread().id)
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  CUresult result = CUDA_SUCCESS;
  if (capture->invalid) {
    result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  } else if (!joined(*capture->graph, stream.frontier)) {
    result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  } else if (capture->handle) {
    *out = capture->handle;
  } else {
    *out = call.sim->graphs.add(std::make_shared<GraphObject>(GraphObject{capture->graph}));
  }
  leave(*call.sim, capture);
  return result;
}

}  // namespace warmserve::simcuda
