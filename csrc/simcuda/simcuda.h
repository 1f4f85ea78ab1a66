// A strict look-alike of libcuda for tests: the cu* functions by their exported names, and below
// them how a test sets it up and asks what it saw. Everything here is C, for ctypes.
//
// One simulated driver a process. It reads no environment. Before the first cu* call its options
// are those of simcuda_reset(), or else of a file "simcuda.conf" beside the path by which the
// library was opened, so that a program that opens "libcuda.so.1" from a folder of ours is
// configured too.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Ends the simulated driver there is, with its threads and all its objects, and begins another,
// not initialised. `options`: lines of "key=value", or null for the defaults. 0, or -1 with
// simcuda_error() saying why; then nothing has changed. No cu* call may be under way.
//
//   devices=1                 how many; all alike
//   peers=0                   1: every two devices reach each other's memory, once access is set
//   visible=0,1               as CUDA_VISIBLE_DEVICES: indices; what follows the first bad one is
//                             not there; empty: none
//   name=Simulated CUDA       of each device
//   driver_version=13000      what cuDriverGetVersion says
//   capability=90             compute capability, times ten
//   memory=8589934592         bytes of each device
//   granularity=2097152       bytes
//   posix_fd=1  rdma=1  read_only_register=1    device attributes
//   host_numa=0               1: memory of the host's NUMA node 0 can be created, mapped and, where
//                             access for that node is set, reached by the CPU. Not with `content`
//   integrated=0              1: the device has no memory but the host's; implies host_numa=1
//   clock=real                streams are threads. Or "virtual": no threads; time moves by what
//                             calls cost and by what is waited for, work runs when its time comes
//   h2d=0  d2h=0  d2d=0       bytes per second of each copy engine, which each device has for
//   itself;
//                             0: no pacing
//   launch=0                  seconds a kernel takes, at least
//   cost.NAME=A+B             the call takes A microseconds and B for each granule of the bytes it
//                             concerns, if any. NAME without its version is all versions of it
//   content=0                 keep so many leading bytes of each granule's content; 0: all of them.
//                             What is not kept reads as zeros
//   detector=1                look for races and for memory given back while in use
int simcuda_reset(const char* options);
const char* simcuda_error(void);

// Faults. Calls of cu* functions are counted from 1 since simcuda_clear_faults(): those of one
// function, or all (null). Calls `first` to `last` return `error` and do nothing else; but an error
// that no context survives is one that all have died of. 0, or -1 with simcuda_error() where there
// is no such function.
void simcuda_clear_faults(void);
int simcuda_fault(const char* function, unsigned long long first, unsigned long long last,
                  int error);
unsigned long long simcuda_calls(const char* function);  // since simcuda_clear_faults()
unsigned long long simcuda_injected(void);               // since simcuda_clear_faults()
const char* simcuda_last_fault(void);                    // the function last failed, or ""

// What others do to the device. Bytes that other processes hold of device 0; an error that its
// context dies of, from now on returned by all work (CUDA_ERROR_ILLEGAL_ADDRESS, ...); somebody
// who destroys its primary context.
void simcuda_others_hold(unsigned long long bytes);
void simcuda_break_context(int error);
void simcuda_destroy_primary_context(void);

// Seconds on the clock since reset.
double simcuda_now(void);
// Reads device memory as it is now, whatever access is set. 0, or -1 where nothing is mapped.
int simcuda_peek(unsigned long long address, void* out, unsigned long long bytes);

// What was seen since reset, as JSON: {"violations": [{"kind": KIND, "message": TEXT, "call": N}],
// "live": {KIND: COUNT, ...}, "calls": {FUNCTION: COUNT, ...}, "seconds": S, "copied": {"h2d":
// BYTES, "d2h": BYTES, "d2d": BYTES}}. `call` is the number of the offending cu* call since reset,
// counted from 1. The caller frees it with simcuda_free.
//
// Kinds: race (unordered overlapping accesses, one of them a write), use-while-unmapped (unmapped,
// unregistered or freed before its use was waited for, or used when nothing was mapped any more),
// uninitialised-read, leak (simcuda_check_leaks), misuse (a call whose behaviour CUDA leaves
// undefined).
char* simcuda_report(void);
void simcuda_free(char* text);
// Adds a violation "leak" for each kind of object that is still there.
void simcuda_check_leaks(void);

#ifdef __cplusplus
}
#endif
