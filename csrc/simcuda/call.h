// The beginning of every cu* call: is there a driver, is it this process's, is a fault due, what
// does the call cost, is there a context.
#pragma once

#include "simcuda/simulator.h"

namespace warmserve::simcuda {

enum class Need {
  nothing,  // may be called before cuInit
  driver,   // cuInit
  context,  // a current context that was not destroyed
  work      // and that nothing has broken
};

// Holds the simulator's lock from here on, where the call goes on.
class Call {
 public:
  Call(Function function, Need need, std::uint64_t bytes = 0);

  explicit operator bool() const { return status == CUDA_SUCCESS; }
  // By handle, with the default streams of the current context; null, and `status` says why. The
  // stream's context is then the one whose state counts.
  Stream* stream(CUstream handle, bool broken_too = false);
  Event* event(CUevent handle);
  // What a call on a range costs beyond itself, by mappings: an H200 takes as long for one of 2 MiB
  // as for one of 512. May drop the lock.
  void pay_for_mappings(Address address, std::uint64_t bytes);
  // What a query says that found something unfinished: polling moves the virtual clock.
  CUresult not_ready();
  Simulator::Origin origin() const { return {number, function}; }
  bool device(CUdevice ordinal);  // whether there is such a device; INVALID_DEVICE
  CUresult fail(CUresult error) { return status = error; }

  const Function function;
  CUresult status = CUDA_SUCCESS;
  Simulator* sim = nullptr;
  Lock lock;
  Context* context = nullptr;  // current; null: none
  std::uint64_t number = 0;    // of this call

 private:
  void begin(Need need, std::uint64_t bytes);
};

// What a context says to work and to waiting: SUCCESS, or what it died of.
CUresult state_of(const Context& context);
Context* current_context(const Simulator& sim);

}  // namespace warmserve::simcuda
