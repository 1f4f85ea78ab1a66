// Stream capture: operations become nodes of a graph, and calls that could disturb a capture are
// refused, which ends the capture [D, O: CUDA.md section 2].
#pragma once

#include "simcuda/call.h"

namespace warmserve::simcuda {

struct Capture {
  std::uint64_t id = 0;
  CUstreamCaptureMode mode{};
  std::uint64_t thread = 0;  // that began it
  Context* context = nullptr;
  Stream* origin = nullptr;
  std::vector<Stream*> streams;  // that take part
  std::shared_ptr<Graph> graph;
  bool invalid = false;
  CUgraph handle = nullptr;  // given out by cuStreamGetCaptureInfo, or null
};

// A potentially unsafe call by this thread: SUCCESS, or 900 with the captures that forbid it
// invalidated.
CUresult unsafe_call(Call& call);
// Something that waits for, or asks about, a stream that is being captured: the same.
CUresult refuse_captured(Stream& stream);
// Work for the legacy stream, which would depend on blocking streams that are being captured: 906.
CUresult legacy_use(Call& call, const Stream& stream);
// The stream is being captured: the work becomes a node.
CUresult add_node(Stream& stream, Work work);
// Waits and records where the stream or the event belongs to a capture. False: neither does.
bool capture_wait(Stream& stream, Event& event, CUresult* result);
bool capture_record(Stream& stream, Event& event, CUresult* result);
CUresult capture_graph(Stream& stream, const Graph& graph);
// A stream leaves, because it is destroyed: its capture is lost.
void abandon_capture(Simulator& sim, Stream& stream);

CUresult begin_capture(Call& call, Stream& stream, CUstreamCaptureMode mode);
CUresult end_capture(Call& call, Stream& stream, CUgraph* out);

}  // namespace warmserve::simcuda
