// A simulated libcuda for tests, stricter than the real one. The library exports the cu* functions
// by their names. This header declares the additional functions by which a test configures the
// simulated driver and queries its observations. All are C functions, for ctypes.
//
// A process has one simulated driver. It reads no environment variables. Its options are those of
// simcuda_reset(). Without a call of it, the first cu* call reads the file "simcuda.conf" beside
// the path by which the library was opened; so a program that opens "libcuda.so.1" from a folder of
// ours is configured too.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Destroys the simulated driver with its threads and all its objects, and makes another one, which
// is not initialised. `options`: lines of "key=value", or null for the defaults. Returns 0; or -1,
// and simcuda_error() says why, in which case nothing has changed. Precondition: no cu* call is
// running.
//
//   devices=1                 number of devices; all have the same properties
//   peers=0                   1: any two devices reach each other's memory, once access is set
//   visible=0,1               as CUDA_VISIBLE_DEVICES: a list of indices, which ends at the first
//                             invalid one; empty: no devices
//   name=Simulated CUDA       name of each device
//   driver_version=13000      result of cuDriverGetVersion
//   capability=90             compute capability, times ten
//   memory=8589934592         bytes of each device
//   granularity=2097152       bytes
//   posix_fd=1  rdma=1  read_only_register=1    device attributes
//   numa_node=0               the node of the host next to every device; -1: there are no nodes
//   host_numa=0               1: memory of the host's NUMA node 0 can be created and mapped; the
//                             CPU reaches it if access for that node is set. Not with `content`
//   integrated=0              1: the device has no memory of its own; implies host_numa=1
//   clock=real                "real": streams are threads. "virtual": there are no threads; time
//                             advances by the costs of calls and by waits, and work runs when its
//                             time has come. "concurrent": as "virtual" for programs of several
//                             threads, whose costs overlap: time advances only while every thread
//                             of the process sleeps. Timed waits of the program still end by the
//                             real clock
//   h2d=0  d2h=0  d2d=0       bytes per second of the copy engines, of which each device has its
//                             own; 0: no pacing
//   copy_start=0              seconds that a paced engine takes for each copy, whatever its size
//   launch=0                  minimum seconds that a kernel takes
//   cost.NAME=A+B             a call takes A microseconds, plus B for each granule of its bytes, if
//                             it has any. A NAME without version means all its versions
//   mapping_lock=0            1: all threads share a lock, held for the cost of cuMemMap and for
//                             the cost of each mapping in cuMemSetAccess and cuMemUnmap
//   mapping_beside_copies=1   factor of these three costs while a paced engine copies from the host
//   context_lock=0            1: these three calls also hold a lock for their whole cost, and calls
//                             that need a context hold it for theirs
//   read=0                    bytes per second that one thread reads out of the page cache; 0:
//   reads
//                             take no time. Concurrent clock only, see simcuda_host_read()
//   dram=0                    bytes per second of the host's memory. Each byte read takes three of
//                             it (read, read for ownership, write back), each byte that a paced
//                             engine copies from or to the host takes one; 0: no limit
//   content=0                 leading bytes of each granule whose content is kept; 0: all of them.
//                             Other bytes read as zeros
//   machine=PATH              a file that all processes of one simulated machine share:
//   cuMemGetInfo
//                             and cuMemCreate then count the memory of all of them, and an
//                             allocation that several of them hold once. Default: this process is
//                             alone. All of them need the same devices. The file is made if there
//                             is none
//   detector=1                detect races, and memory that is released while in use
int simcuda_reset(const char* options);
const char* simcuda_error(void);

// Injects faults. Calls of cu* functions are counted from 1 since simcuda_clear_faults(): calls of
// `function`, or of all functions if it is null. Calls `first` to `last` return `error` and do
// nothing else, except that an error which no context survives kills all contexts. Returns 0, or -1
// with simcuda_error() for an unknown function.
void simcuda_clear_faults(void);
int simcuda_fault(const char* function, unsigned long long first, unsigned long long last,
                  int error);
unsigned long long simcuda_calls(const char* function);  // since simcuda_clear_faults()
unsigned long long simcuda_injected(void);               // since simcuda_clear_faults()
const char* simcuda_last_fault(void);                    // the function of the last fault, or ""

// Simulates effects of other users of device 0: other processes hold `bytes` of its memory; its
// context dies of `error`, which all work returns from then on (CUDA_ERROR_ILLEGAL_ADDRESS, ...);
// its primary context is destroyed.
void simcuda_others_hold(unsigned long long bytes);
void simcuda_break_context(int error);
void simcuda_destroy_primary_context(void);

// Says that the calling thread has just read that many bytes of a file into memory. On the
// concurrent clock the call takes the time of the read (options `read` and `dram`), on others none.
void simcuda_host_read(unsigned long long bytes);
// Sleeps: on the concurrent clock in its time, with the timer slack that the system gives the
// thread; on others in real time.
void simcuda_sleep(unsigned long long nanoseconds);

// Returns the seconds on the clock since the reset.
double simcuda_now(void);
// Reads the current content of device memory, whatever access is set. Returns 0, or -1 if part of
// the range is not mapped.
int simcuda_peek(unsigned long long address, void* out, unsigned long long bytes);

// Returns the observations since the reset, as JSON: {"violations": [{"kind": KIND, "message":
// TEXT, "call": N}], "live": {KIND: COUNT, ...}, "calls": {FUNCTION: COUNT, ...}, "seconds": S,
// "copied": {"h2d": BYTES, "d2h": BYTES, "d2d": BYTES}, "lock_waits": {"mapping": {"calls": N,
// "seconds": S}, "context": {"calls": N, "seconds": S}}}. `call` is the number of the offending cu*
// call since the reset, counted from 1. The caller frees the text with simcuda_free().
//
// Kinds: race (unordered overlapping accesses, at least one of them a write), use-while-unmapped
// (memory was unmapped, unregistered or freed before its use was waited for, or was used when it
// was no longer mapped), uninitialised-read, leak (see simcuda_check_leaks()), misuse (a call whose
// behaviour CUDA leaves undefined).
char* simcuda_report(void);
void simcuda_free(char* text);
// Adds a violation "leak" for each kind of object that still exists.
void simcuda_check_leaks(void);

#ifdef __cplusplus
}
#endif
