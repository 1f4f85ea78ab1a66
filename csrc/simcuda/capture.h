// Stream capture: operations become nodes of a graph, and calls that could disturb a capture are
// refused, which ends the capture [D h:15480, O cccl#11360].
#pragma once

#include "simcuda/call.h"

namespace warmserve::simcuda {

struct Capture {
  std::uint64_t id = 0;
  CUstreamCaptureMode mode{};
  std::uint64_t thread = 0;  // the thread that began the capture
  Context* context = nullptr;
  Stream* origin = nullptr;
  std::vector<Stream*> streams;  // the streams that take part
  std::shared_ptr<Graph> graph;
  bool invalid = false;
  CUgraph handle = nullptr;  // returned by cuStreamGetCaptureInfo, or null
};

// Checks a potentially unsafe call of this thread. Returns SUCCESS; or 900, after invalidating the
// captures that forbid the call.
CUresult unsafe_call(Call& call);
// The same check for a call that waits for, or queries, a stream that is being captured.
CUresult refuse_captured(Stream& stream);
// Checks work for the legacy stream. Returns 906 if it would depend on blocking streams that are
// being captured.
CUresult legacy_use(Call& call, const Stream& stream);
// Adds the work as a node. Precondition: the stream is being captured.
CUresult add_node(Stream& stream, Work work);
// Handle a wait or a record if the stream or the event belongs to a capture. Return false if
// neither does.
bool capture_wait(Stream& stream, Event& event, CUresult* result);
bool capture_record(Stream& stream, Event& event, CUresult* result);
CUresult capture_graph(Stream& stream, const Graph& graph);
// Invalidates the capture of a stream that is being destroyed.
void abandon_capture(Simulator& sim, Stream& stream);

CUresult begin_capture(Call& call, Stream& stream, CUstreamCaptureMode mode);
CUresult end_capture(Call& call, Stream& stream, CUgraph* out);

}  // namespace warmserve::simcuda
