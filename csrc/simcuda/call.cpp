#include "simcuda/call.h"

namespace warmserve::simcuda {
namespace {

// Returns whether the error kills all contexts. [D h:2767+]: the process has to be relaunched.
bool kills_contexts(CUresult error) {
  switch (static_cast<int>(error)) {
    case 226:
    case 700:
    case 702:
    case 721:
    case 911: return true;
    default: return error >= 714 && error <= 719;
  }
}

bool is_mapping_call(Function function) {
  return function == Function::cuMemMap || function == Function::cuMemSetAccess ||
         function == Function::cuMemUnmap;
}

// Holds a lock of the real driver while a call pays a cost.
class Held {
 public:
  Held(Call& call, bool wanted, CostLock& lock) : call_(call), lock_(wanted ? &lock : nullptr) {
    if (lock_) call_.sim->take(call_.lock, *lock_);
  }
  ~Held() {
    if (lock_) call_.sim->give(*lock_);
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

 private:
  Call& call_;
  CostLock* const lock_;
};

}  // namespace

// The time of a query that returns NOT_READY, if calls of its function cost nothing.
constexpr Nanoseconds kPoll = 10'000;

CUresult state_of(const Context& context) {
  return context.destroyed ? CUDA_ERROR_CONTEXT_IS_DESTROYED : context.sticky;
}

Context* current_context(const Simulator& sim) {
  const ThreadState& thread = this_thread();
  if (thread.generation != sim.generation || thread.depth == 0) return nullptr;
  return thread.stack[thread.depth - 1];
}

Call::Call(Function f, Need need, std::uint64_t bytes) : function(f) {
  if (exiting()) {  // [O ucx#11275]
    status = CUDA_ERROR_DEINITIALIZED;
  } else if (forked()) {  // undefined in CUDA; a child typically gets 3
    status = CUDA_ERROR_NOT_INITIALIZED;
  } else if (this_thread().in_callback) {  // [D h:18127]
    status = CUDA_ERROR_NOT_PERMITTED;
  } else if ((sim = simulator()) == nullptr) {
    status = CUDA_ERROR_SYSTEM_NOT_READY;
  } else {
    lock = Lock(sim->mutex);
    begin(need, bytes);
  }
}

void Call::begin(Need need, std::uint64_t bytes) {
  const auto index = static_cast<std::size_t>(function);
  number = ++sim->calls;
  ++sim->called[index];
  const std::uint64_t nth = ++sim->called_since_clear[index];
  ++sim->calls_since_clear;
  for (const Fault& fault : sim->faults) {
    const std::uint64_t count = fault.function == kFunctions ? sim->calls_since_clear : nth;
    if ((fault.function != kFunctions && fault.function != index) || count < fault.first ||
        count > fault.last)
      continue;
    ++sim->injected;
    sim->last_fault = name_of(function);
    status = fault.error;
    if (kills_contexts(fault.error)) {
      for (const auto& each : sim->contexts) sim->kill_context(*each, fault.error);
      sim->settle(lock);  // the caller may release memory that running copies read
    }
    return;
  }
  if (need != Need::nothing && !sim->initialised) {
    status = CUDA_ERROR_NOT_INITIALIZED;
    return;
  }
  if (sim->options.any_cost || sim->options.virtual_clock()) {
    const Cost cost = sim->options.costs[index];
    const std::uint64_t granules = ceil_div(bytes, sim->options.granularity);
    pay(cost.call + cost.granule * static_cast<double>(granules), need);
  }
  context = current_context(*sim);
  if (need == Need::nothing || need == Need::driver) return;
  if (!context) {
    status = CUDA_ERROR_INVALID_CONTEXT;
  } else if (context->destroyed || need == Need::work) {
    status = state_of(*context);
    if (status != CUDA_SUCCESS) sim->settle(lock);
  }
}

Stream* Call::stream(CUstream handle, bool broken_too) {
  Stream* found = nullptr;
  if (handle == nullptr || handle == CU_STREAM_LEGACY) {
    found = context->legacy.get();
  } else if (handle == CU_STREAM_PER_THREAD) {
    found = sim->per_thread_stream(context);
  } else {
    found = sim->streams.find(handle);
  }
  if (!found) {
    status = CUDA_ERROR_INVALID_HANDLE;
  } else if (!broken_too) {
    status = state_of(*found->context);
  }
  return status == CUDA_SUCCESS ? found : nullptr;
}

Event* Call::event(CUevent handle) {
  Event* const found = sim->events.find(handle);
  if (!found) status = CUDA_ERROR_INVALID_HANDLE;
  return found;
}

// Pays the cost of the call itself. The kernel's lock is held for a map call only: set-access and
// unmap calls take it for each mapping.
void Call::pay(double cost, Need need) {
  const bool in_context = need == Need::work || is_mapping_call(function);
  const bool in_kernel = function == Function::cuMemMap;
  const Held context(*this, cost > 0 && in_context && sim->options.context_lock, sim->context_lock);
  const Held mapping(*this, cost > 0 && in_kernel && sim->options.mapping_lock, sim->mapping_lock);
  if (is_mapping_call(function)) cost = beside_copies(cost);
  sim->pay(lock, static_cast<Nanoseconds>(cost + 0.5));
}

void Call::pay_for_mappings(Address address, std::uint64_t bytes) {
  const double each = sim->options.costs[static_cast<std::size_t>(function)].granule;
  if (each == 0) return;
  const std::size_t mappings = sim->memory.whole(address, bytes).size();
  const std::size_t turns = sim->options.mapping_lock ? mappings : 1;
  const double turn = each * static_cast<double>(mappings) / static_cast<double>(turns);
  const Held context(*this, sim->options.context_lock, sim->context_lock);
  for (std::size_t i = 0; i < turns; ++i) {
    const Held mapping(*this, sim->options.mapping_lock, sim->mapping_lock);
    sim->pay(lock, static_cast<Nanoseconds>(beside_copies(turn) + 0.5));
  }
}

// Returns the cost of a mapping now: the kernel writes page tables by a copy engine.
double Call::beside_copies(double cost) const {
  return sim->traffic(Engine::h2d) > 0 ? cost * sim->options.mapping_beside_copies : cost;
}

CUresult Call::not_ready() {
  const bool paid = sim->options.costs[static_cast<std::size_t>(function)].call > 0;
  if (sim->options.virtual_clock() && !paid) sim->pay(lock, kPoll);
  return CUDA_ERROR_NOT_READY;
}

bool Call::device(CUdevice ordinal) {
  if (ordinal < 0 || ordinal >= static_cast<int>(sim->devices.size()))
    status = CUDA_ERROR_INVALID_DEVICE;
  return status == CUDA_SUCCESS;
}

}  // namespace warmserve::simcuda
