// The checks at the beginning of every cu* call: a usable simulator, a fork, a due fault, the cost
// of the call, a current context.
#pragma once

#include "simcuda/simulator.h"

namespace warmserve::simcuda {

enum class Need {
  nothing,  // no requirement: may be called before cuInit
  driver,   // cuInit was called
  context,  // and a current context that was not destroyed
  work      // and that has no sticky error
};

// A running cu* call. If its checks succeed, it holds the simulator's lock until it ends.
class Call {
 public:
  Call(Function function, Need need, std::uint64_t bytes = 0);

  explicit operator bool() const { return status == CUDA_SUCCESS; }
  // Returns a stream by its handle, including the default streams of the current context. Returns
  // null and sets `status` if the handle is invalid or, unless `broken_too`, if the stream's
  // context has a sticky error.
  Stream* stream(CUstream handle, bool broken_too = false);
  Event* event(CUevent handle);
  // Pays the additional cost of a call on a range, per mapping and not per granule: an H200 takes
  // as long for a mapping of 2 MiB as for one of 512 MiB. May release the lock.
  void pay_for_mappings(Address address, std::uint64_t bytes);
  // Returns NOT_READY. Also advances the virtual clock, so that a polling loop ends.
  CUresult not_ready();
  Simulator::Origin origin() const { return {number, function}; }
  bool device(CUdevice ordinal);  // false, and sets INVALID_DEVICE, if the device does not exist
  CUresult fail(CUresult error) { return status = error; }

  const Function function;
  CUresult status = CUDA_SUCCESS;
  Simulator* sim = nullptr;
  Lock lock;
  Context* context = nullptr;  // the current context; null: no context is current
  std::uint64_t number = 0;    // of this call, counted from the reset

 private:
  void begin(Need need, std::uint64_t bytes);
  void pay(double cost, Need need);
  double beside_copies(double cost) const;
};

// Returns a context's answer to work and to waits: SUCCESS, CONTEXT_IS_DESTROYED or its sticky
// error.
CUresult state_of(const Context& context);
Context* current_context(const Simulator& sim);

}  // namespace warmserve::simcuda
