// Captures and graphs. Nodes keep addresses, which are resolved when the graph runs: a graph that
// is replayed after other granules were mapped uses the new granules.
#include "simcuda/call.h"
#include "simcuda/capture.h"

namespace warmserve::simcuda {
namespace {

CUresult instantiate(Call& call, CUgraphExec* out, CUgraph handle, unsigned long long flags) {
  const GraphObject* const graph = call.sim->graphs.find(handle);
  if (!out || !graph || flags > 15) return CUDA_ERROR_INVALID_VALUE;
  auto exec = std::make_shared<GraphExec>();
  exec->graph = std::make_shared<Graph>(*graph->graph);  // a copy: the graph may change later
  exec->context = call.context;
  for (std::uint32_t i = 0; i < exec->graph->chains; ++i)
    exec->agents.push_back(call.sim->detector.add_agent());
  *out = call.sim->execs.add(std::move(exec));
  return CUDA_SUCCESS;
}

}  // namespace

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
  Call call(Function::cuStreamBeginCapture_v2, Need::work);
  if (!call) return call.status;
  Stream* const stream = call.stream(handle);
  if (!stream) return call.status;
  if (mode < CU_STREAM_CAPTURE_MODE_GLOBAL || mode > CU_STREAM_CAPTURE_MODE_RELAXED)
    return CUDA_ERROR_INVALID_VALUE;
  return begin_capture(call, *stream, mode);
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* out) {
  Call call(Function::cuStreamEndCapture, Need::work);
  if (!call) return call.status;
  Stream* const stream = call.stream(handle);
  if (!stream) return call.status;
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  return end_capture(call, *stream, out);
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  Call call(Function::cuStreamIsCapturing, Need::context);
  if (!call) return call.status;
  Stream* const stream = call.stream(handle, true);
  if (!stream) return call.status;
  if (!status) return CUDA_ERROR_INVALID_VALUE;
  // A query of the legacy stream while a blocking stream is captured returns 906; the capture stays
  // valid [D].
  if (stream->legacy)
    for (const StreamPtr& other : stream->context->streams)
      if (other->capture && other->blocking()) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  *status = !stream->capture           ? CU_STREAM_CAPTURE_STATUS_NONE
            : stream->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                       : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo_v2(CUstream handle, CUstreamCaptureStatus* status,
                                   unsigned long long* id, CUgraph* graph,
                                   const CUgraphNode** nodes, std::size_t* count) {
  Call call(Function::cuStreamGetCaptureInfo_v2, Need::context);
  if (!call) return call.status;
  Stream* const stream = call.stream(handle, true);
  if (!stream) return call.status;
  if (!status) return CUDA_ERROR_INVALID_VALUE;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  Capture* const capture = stream->capture.get();
  if (!capture) return CUDA_SUCCESS;
  *status =
      capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  if (capture->invalid) return CUDA_SUCCESS;
  if (id) *id = capture->id;
  if (graph) {
    if (!capture->handle)
      capture->handle =
          call.sim->graphs.add(std::make_shared<GraphObject>(GraphObject{capture->graph}));
    *graph = capture->handle;
  }
  if (nodes) *nodes = nullptr;  // nodes have no handles in the simulator
  if (count) *count = 0;
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiate_v2(CUgraphExec* out, CUgraph graph, CUgraphNode* bad_node, char* log,
                               std::size_t log_bytes) {
  Call call(Function::cuGraphInstantiate_v2, Need::work);
  if (!call) return call.status;
  if (bad_node) *bad_node = nullptr;
  if (log && log_bytes > 0) *log = 0;
  return instantiate(call, out, graph, 0);
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* out, CUgraph graph, unsigned long long flags) {
  Call call(Function::cuGraphInstantiateWithFlags, Need::work);
  return call ? instantiate(call, out, graph, flags) : call.status;
}

// Returns only the number of nodes; nodes have no handles in the simulator.
CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, std::size_t* count) {
  Call call(Function::cuGraphGetNodes, Need::driver);
  if (!call) return call.status;
  const GraphObject* const graph = call.sim->graphs.find(handle);
  if (!graph || !count) return CUDA_ERROR_INVALID_VALUE;
  if (nodes) return CUDA_ERROR_NOT_SUPPORTED;
  *count = graph->graph->nodes.size();
  return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
  Call call(Function::cuGraphLaunch, Need::work);
  if (!call) return call.status;
  GraphExec* const exec = call.sim->execs.find(handle);
  if (!exec) return CUDA_ERROR_INVALID_VALUE;
  Stream* const stream = call.stream(stream_handle);
  if (!stream) return call.status;
  if (const CUresult refused = legacy_use(call, *stream); refused != CUDA_SUCCESS) return refused;
  if (stream->capture) return capture_graph(*stream, *exec->graph);
  return call.sim->launch_graph(*stream, *exec, call.origin());
}

// Running launches continue [D].
CUresult cuGraphExecDestroy(CUgraphExec handle) {
  Call call(Function::cuGraphExecDestroy, Need::driver);
  if (!call) return call.status;
  const auto exec = call.sim->execs.take(handle);
  if (!exec) return CUDA_ERROR_INVALID_VALUE;
  for (const Agent agent : exec->agents) call.sim->detector.retire(agent);
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph handle) {
  Call call(Function::cuGraphDestroy, Need::driver);
  if (!call) return call.status;
  return call.sim->graphs.take(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace warmserve::simcuda
