// Lookup of functions by name. A program that requests a version gets the function that this
// version of the header declares under the name. A request for 13000 may therefore return a
// function with other parameters than the program expects.
#include <cstring>

#include "simcuda/call.h"

namespace warmserve::simcuda {
namespace {

struct Entry {
  const char *symbol, *base;
  int since;
  void* function;
};

const Entry kEntries[] = {
#define X(name, base, since, parameters) {#name, #base, since, reinterpret_cast<void*>(&name)},
    WARMSERVE_SIMCUDA_FUNCTIONS(X)
#undef X
    // CUDA 12.0 renamed this function of 11.4 to the name without suffix.
    {"cuGraphInstantiateWithFlags", "cuGraphInstantiate", 12000,
     reinterpret_cast<void*>(&cuGraphInstantiateWithFlags)},
};

constexpr unsigned long long kPerThreadStream = 2;

CUresult find(Call& call, const char* symbol, void** function, int version,
              unsigned long long flags, ProcStatus* status) {
  if (!symbol || !function || flags > kPerThreadStream) return CUDA_ERROR_INVALID_VALUE;
  if (version > call.sim->options.driver_version) return CUDA_ERROR_INVALID_VALUE;  // [D h:24347]
  *function = nullptr;
  const Entry* best = nullptr;
  bool known = false;
  for (const Entry& entry : kEntries) {
    const bool exact = std::strcmp(entry.symbol, symbol) == 0;
    if (!exact && std::strcmp(entry.base, symbol) != 0) continue;
    // The simulator has no variants whose stream 0 is the per-thread stream.
    if (flags == kPerThreadStream) continue;
    known = true;
    if (entry.since > version) continue;
    if (!best || entry.since > best->since) best = &entry;
  }
  if (best) *function = best->function;
  if (status)
    *status = best    ? CU_GET_PROC_ADDRESS_SUCCESS
              : known ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                      : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return best || status ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // namespace

// The older function reports every failed lookup as NOT_FOUND; it has no status argument.
CUresult cuGetProcAddress(const char* symbol, void** function, int version,
                          unsigned long long flags) {
  Call call(Function::cuGetProcAddress, Need::nothing);
  return call ? find(call, symbol, function, version, flags, nullptr) : call.status;
}

CUresult cuGetProcAddress_v2(const char* symbol, void** function, int version,
                             unsigned long long flags, ProcStatus* status) {
  Call call(Function::cuGetProcAddress_v2, Need::nothing);
  if (!call) return call.status;
  ProcStatus ignored{};
  return find(call, symbol, function, version, flags, status ? status : &ignored);
}

}  // namespace warmserve::simcuda
