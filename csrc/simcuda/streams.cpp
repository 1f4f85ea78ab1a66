// The simulator's methods for streams: enqueueing operations, and waiting for them.
#include <algorithm>
#include <system_error>

#include "simcuda/call.h"
#include "simcuda/capture.h"

namespace warmserve::simcuda {
namespace {

void add(std::vector<OperationPtr>* after, const OperationPtr& operation) {
  if (operation && !operation->done) after->push_back(operation);
}

}  // namespace

void Simulator::order(Stream& stream, std::vector<OperationPtr>* after) {
  const bool clocks = detector.on();
  if (clocks) stream.clock.join(detector.host);
  Context& context = *stream.context;
  if (stream.legacy) {
    for (const StreamPtr& other : context.streams) {
      if (!other->blocking()) continue;
      add(after, other->tail);
      if (clocks) stream.clock.join(other->clock);
    }
    for (const Ghost& ghost : context.ghosts) {
      if (!ghost.blocking) continue;
      add(after, ghost.tail);
      if (clocks) stream.clock.join(ghost.clock);
    }
  } else if (stream.blocking()) {
    add(after, context.legacy->tail);
    if (clocks) stream.clock.join(context.legacy->clock);
  }
}

CUresult Simulator::enqueue(Stream& stream, Work work, const Origin& origin, OperationPtr* out,
                            OperationPtr also_after) {
  auto operation = std::make_shared<Operation>();
  operation->work = std::move(work);
  operation->context = stream.context;
  operation->call = origin.call;
  order(stream, &operation->after);
  add(&operation->after, also_after);
  if (!std::holds_alternative<Marker>(operation->work))
    operation->races = detector.observe(memory, operation->work, stream.agent, &stream.clock,
                                        origin.call, name_of(origin.function));
  schedule(stream, operation);
  if (out) *out = std::move(operation);
  return CUDA_SUCCESS;
}

// Enqueues a wait for the event's current recording. A later recording does not change the wait.
void Simulator::enqueue_wait(Stream& stream, Event& event, const Origin& origin) {
  if (!event.operation) return;
  if (detector.on()) stream.clock.join(event.clock);
  enqueue(stream, Marker{}, origin, nullptr, event.operation);
}

void Simulator::enqueue_record(Stream& stream, Event& event, const Origin& origin) {
  enqueue(stream, Marker{}, origin, &event.operation);
  event.capture = nullptr;
  if (detector.on()) event.clock = stream.clock;
}

CUresult Simulator::launch_graph(Stream& stream, GraphExec& exec, const Origin& origin) {
  const Graph& graph = *exec.graph;
  std::vector<OperationPtr> first;  // operations that precede all nodes
  order(stream, &first);
  add(&first, exec.last);
  std::vector<bool> is_leaf(graph.nodes.size(), true);
  bool races = false;
  std::vector<VectorClock> clocks(detector.on() ? graph.nodes.size() : 0);
  VectorClock base = stream.clock, end = stream.clock;
  base.join(exec.clock);
  end.join(exec.clock);
  for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& node = graph.nodes[i];
    for (const std::uint32_t before : node.after) is_leaf[before] = false;
    if (!detector.on()) continue;
    clocks[i] = base;
    for (const std::uint32_t before : node.after) clocks[i].join(clocks[before]);
    races |= detector.observe(memory, node.work, exec.agents[node.chain], &clocks[i], origin.call,
                              name_of(origin.function));
    end.join(clocks[i]);
  }
  std::vector<OperationPtr> leaves;
  if (options.virtual_clock()) {
    add(&first, stream.tail);
    std::vector<OperationPtr> made;
    for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
      auto operation = std::make_shared<Operation>();
      operation->work = graph.nodes[i].work;
      operation->context = stream.context;
      operation->call = origin.call;
      operation->after = first;
      operation->races = races;
      for (const std::uint32_t before : graph.nodes[i].after)
        operation->after.push_back(made[before]);
      schedule_virtual(operation, now());
      if (is_leaf[i]) leaves.push_back(operation);
      made.push_back(std::move(operation));
    }
  }
  auto last = std::make_shared<Operation>();
  if (!options.virtual_clock()) last->work = GraphRun{exec.graph};
  last->context = stream.context;
  last->call = origin.call;
  last->races = races;
  last->after = std::move(first);
  last->after.insert(last->after.end(), leaves.begin(), leaves.end());
  schedule(stream, last);
  exec.last = std::move(last);
  if (detector.on()) {
    stream.clock.join(end);
    exec.clock = std::move(end);
  }
  return CUDA_SUCCESS;
}

// Removes a stream. Its pending operations still run [D].
void Simulator::remove_stream(Lock&, const StreamPtr& stream) {
  Context& context = *stream->context;
  if (stream->capture) abandon_capture(*this, *stream);
  context.streams.erase(stream);
  detector.retire(stream->agent);
  std::erase_if(context.ghosts, [&](const Ghost& ghost) {
    return (!ghost.tail || ghost.tail->done) &&
           (!detector.on() || detector.host.covers(ghost.clock));
  });
  context.ghosts.push_back({stream->tail, stream->clock, stream->blocking()});
  if (stream->thread.joinable()) {
    stream->closed = true;
    stream->wake.notify_one();
    leaving_.push_back(stream);
  }
  // Joining under the lock is safe: a thread that has ended takes no lock any more.
  std::erase_if(leaving_, [](const StreamPtr& left) {
    if (left->ended) left->thread.join();
    return left->ended;
  });
}

bool Simulator::stream_done(Stream& stream) {
  const auto done = [](const OperationPtr& tail) { return !tail || tail->done; };
  if (!done(stream.tail)) return false;
  if (!stream.legacy) return true;
  const Context& context = *stream.context;
  return std::all_of(
             context.streams.begin(), context.streams.end(),
             [&](const StreamPtr& other) { return !other->blocking() || done(other->tail); }) &&
         std::all_of(context.ghosts.begin(), context.ghosts.end(),
                     [&](const Ghost& ghost) { return !ghost.blocking || done(ghost.tail); });
}

VectorClock Simulator::clock_of_next(Stream& stream) {
  std::vector<OperationPtr> unused;
  order(stream, &unused);
  return stream.clock;
}

void Simulator::know_stream(Stream& stream) {
  if (!detector.on()) return;
  detector.host_knows(stream.legacy ? clock_of_next(stream) : stream.clock);
}

CUresult Simulator::wait_for(Lock& lock, const OperationPtr& operation, Context* context) {
  if (operation && !operation->done) {
    if (options.concurrent())
      sleep_until(lock, operation->end);
    else if (options.virtual_clock())
      advance(lock, operation->end);
    ++waiting_;
    done_.wait(lock, [&] { return operation->done || stopping_; });
    --waiting_;
    if (!operation->done) return CUDA_ERROR_DEINITIALIZED;
  }
  const CUresult state = state_of(*context);
  if (state != CUDA_SUCCESS) settle(lock);
  return state;
}

void Simulator::settle(Lock& lock) {
  ++waiting_;
  done_.wait(lock, [&] { return moving_ == 0; });
  --waiting_;
}

CUresult Simulator::synchronize_stream(Lock& lock, Stream& stream) {
  Context* const context = stream.context;
  if (stream.legacy) {
    // A wait for the legacy stream includes the blocking streams, which its next operation follows.
    enqueue(stream, Marker{}, {0, Function::cuStreamSynchronize});
  }
  const VectorClock clock = stream.clock;  // operations enqueued during the wait are not waited for
  const OperationPtr tail = stream.tail;
  const CUresult result = wait_for(lock, tail, context);
  if (result == CUDA_SUCCESS) detector.host_knows(clock);
  return result;
}

CUresult Simulator::synchronize_context(Lock& lock, Context* context) {
  VectorClock clock = context->legacy->clock;
  for (const StreamPtr& stream : context->streams) clock.join(stream->clock);
  for (const Ghost& ghost : context->ghosts) clock.join(ghost.clock);
  const CUresult result = drain_context(lock, context);
  if (result == CUDA_SUCCESS) detector.host_knows(clock);
  return result;
}

// Waits with the lock released. Other threads of the program may extend the host's vector clock
// meanwhile; the clock is never set back.
CUresult Simulator::drain_context(Lock& lock, Context* context) {
  std::vector<OperationPtr> tails{context->legacy->tail};
  for (const StreamPtr& stream : context->streams) tails.push_back(stream->tail);
  for (const Ghost& ghost : context->ghosts) tails.push_back(ghost.tail);
  CUresult result = state_of(*context);
  for (const OperationPtr& tail : tails) result = wait_for(lock, tail, context);
  return result;
}

}  // namespace warmserve::simcuda
