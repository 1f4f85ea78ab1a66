// The simulator's methods for contexts: creation, death by an error, and destruction with all
// objects.
#include "simcuda/capture.h"
#include "simcuda/simulator.h"

namespace warmserve::simcuda {
namespace {

std::atomic<std::uint64_t> next_generation{1};

}  // namespace

Simulator::Simulator(const Options& given, std::unique_ptr<Machine> machine)
    : options(given),
      generation(next_generation.fetch_add(1)),
      memory(options, std::move(machine)),
      detector(options.detector),
      devices(options.visible_devices().size()),
      began_(std::chrono::steady_clock::now()) {}

Simulator::~Simulator() = default;

Context* Simulator::find_context(CUcontext handle) const {
  for (const auto& context : contexts)
    if (context->handle == handle) return context.get();
  return nullptr;
}

Context* Simulator::create_context(int device, bool primary, unsigned flags) {
  auto context = std::make_unique<Context>();
  context->handle = reinterpret_cast<CUcontext>(new_handle());
  context->id = contexts.size() + 1;
  context->device = device;
  context->primary = primary;
  context->flags = flags;
  context->limits = {1024, 1 * kMiB, 8 * kMiB, 2, 2048, 64, 0, 0, 0, 0};
  context->legacy = std::make_shared<Stream>();
  context->legacy->handle = CU_STREAM_LEGACY;
  context->legacy->context = context.get();
  context->legacy->legacy = true;
  context->legacy->id = new_handle() / 16;
  context->legacy->agent = detector.add_agent();
  contexts.push_back(std::move(context));
  return contexts.back().get();
}

void Simulator::kill_context(Context& context, CUresult error) {
  if (context.sticky == CUDA_SUCCESS) context.sticky = error;
  detector.host_knows(context.legacy->clock);
  for (const StreamPtr& stream : context.streams) detector.host_knows(stream->clock);
  for (const Ghost& ghost : context.ghosts) detector.host_knows(ghost.clock);
}

// Returns the per-thread default stream of the calling thread.
Stream* Simulator::per_thread_stream(Context* context) {
  StreamPtr& stream = context->per_thread[this_thread().id];
  if (!stream) {
    stream = add_stream(context, CU_STREAM_DEFAULT, 0);
    stream->handle = CU_STREAM_PER_THREAD;
  }
  return stream.get();
}

StreamPtr Simulator::add_stream(Context* context, unsigned flags, int priority) {
  auto stream = std::make_shared<Stream>();
  stream->context = context;
  stream->id = new_handle() / 16;
  stream->flags = flags;
  stream->priority = priority;
  stream->agent = detector.add_agent();
  context->streams.insert(stream);
  return stream;
}

void Simulator::destroy_context(Lock& lock, Context* context, bool drop_work) {
  if (!drop_work) synchronize_context(lock, context);
  context->destroyed = true;
  kill_context(*context, CUDA_ERROR_CONTEXT_IS_DESTROYED);
  // Running operations may still access memory that is about to be freed. With the virtual clock no
  // operation runs concurrently.
  if (drop_work && !options.virtual_clock()) synchronize_context(lock, context);
  for (const StreamPtr& stream : std::set<StreamPtr>(context->streams)) {
    streams.take(stream->handle);
    remove_stream(lock, stream);
  }
  context->per_thread.clear();
  detector.retire(context->legacy->agent);
  // Handles are never reused, so a later use of one of these is recognised as invalid.
  modules.erase_if([&](const Module& module) { return module.context == context; });
  kernels.erase_if([&](const Kernel& kernel) { return kernel.context == context; });
  events.erase_if([&](const Event& event) { return event.context == context; });
  execs.erase_if([&](const GraphExec& exec) { return exec.context == context; });
  memory.free_all_of(context->handle);
  if (context->primary) devices[context->device].primary = nullptr;
}

}  // namespace warmserve::simcuda
