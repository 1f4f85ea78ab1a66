// The simulated driver: one object that holds all simulated state, and its start and end.
//
// One mutex guards the object. It is released while an operation moves bytes, while a host function
// of the program runs, and while a call waits or pays its cost. The program's functions are never
// called with it held. Only locks that processes share are taken under it: of the machine's table,
// and of a shared allocation.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <limits>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "simcuda/detector.h"
#include "simcuda/handles.h"
#include "simcuda/threads.h"

namespace warmserve::simcuda {

using Lock = std::unique_lock<std::mutex>;

struct Capture;

struct Stream {
  CUstream handle = nullptr;
  Context* context = nullptr;
  std::uint64_t id = 0;
  unsigned flags = 0;
  int priority = 0;
  bool legacy = false;
  bool blocking() const { return !legacy && !(flags & CU_STREAM_NON_BLOCKING); }

  OperationPtr tail;  // the last enqueued operation, or null
  Agent agent = 0;
  VectorClock clock;

  std::shared_ptr<Capture> capture;     // the capture that the stream takes part in
  std::vector<std::uint32_t> frontier;  // nodes that the stream's next node depends on
  std::uint32_t chain = 0;

  // Real clock only: the thread that runs the stream, started by the first operation that needs it.
  std::deque<OperationPtr> queue;
  std::condition_variable wake;
  bool closed = false;  // the thread ends when the queue is empty
  bool ended = false;
  std::thread thread;
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  Context* context = nullptr;
  unsigned flags = 0;
  OperationPtr operation;  // the last recording; null: never recorded
  VectorClock clock;
  std::shared_ptr<Capture> capture;  // the capture of the last recording; it may have ended
  std::vector<std::uint32_t> frontier;
};

// The work of a destroyed stream.
struct Ghost {
  OperationPtr tail;
  VectorClock clock;
  bool blocking;
};

struct Context {
  CUcontext handle = nullptr;
  std::uint64_t id = 0;
  int device = 0;
  bool primary = false;
  unsigned flags = 0;
  bool destroyed = false;
  CUresult sticky = CUDA_SUCCESS;
  StreamPtr legacy;
  std::set<StreamPtr> streams;  // all streams except the legacy one; per-thread streams included
  std::unordered_map<std::uint64_t, StreamPtr> per_thread;
  std::vector<Ghost> ghosts;
  std::array<std::size_t, 10> limits{};
};

struct Device {
  unsigned primary_flags = 0;
  std::uint64_t retained = 0;
  Context* primary = nullptr;  // null: not active
};

struct Module {
  Context* context;
};
struct Kernel {
  CUmodule module;
  Context* context;
  std::string symbol;
};
struct GraphObject {
  std::shared_ptr<const Graph> graph;
};
struct GraphExec {
  std::shared_ptr<const Graph> graph;
  Context* context = nullptr;
  std::vector<Agent> agents;  // one per chain
  OperationPtr last;          // launches of one exec run one after the other
  VectorClock clock;
};

struct Fault {
  std::size_t function;  // kFunctions: any function
  std::uint64_t first, last;
  CUresult error;
};

constexpr Nanoseconds kNeverDue = std::numeric_limits<Nanoseconds>::max();

// A thread that waits for a time on the concurrent clock, or for a cost lock.
struct Sleeper {
  Nanoseconds until = kNeverDue;
  double unread = 0;  // bytes of a file that the thread is still reading
  bool woken = false;
  pid_t thread = 0;
  std::condition_variable wake;
};

// A lock of the real driver, held while a thread pays certain costs. Threads get it in the order in
// which they asked.
struct CostLock {
  bool held = false;
  std::deque<Sleeper*> queue;
  std::uint64_t waits = 0;  // calls that had to wait, and the time they waited
  Nanoseconds waited = 0;
};

class Simulator {
 public:
  Simulator(const Options& options, std::unique_ptr<Machine> machine);
  ~Simulator();  // precondition: stop() was called

  const Options options;
  const std::uint64_t generation;  // unique in the process
  std::mutex mutex;                // guards all members below

  bool initialised = false;
  Memory memory;
  Detector detector;
  std::vector<Device> devices;
  std::vector<std::unique_ptr<Context>> contexts;  // also destroyed ones: threads may refer to them
  Handles<CUstream, Stream> streams;
  Handles<CUevent, Event> events;
  Handles<CUmodule, Module> modules;
  Handles<CUfunction, Kernel> kernels;
  Handles<CUgraph, GraphObject> graphs;
  Handles<CUgraphExec, GraphExec> execs;
  std::vector<std::shared_ptr<Capture>> captures;  // captures that have not ended

  std::uint64_t calls = 0;
  std::array<std::uint64_t, kFunctions> called{}, called_since_clear{};
  std::uint64_t calls_since_clear = 0, injected = 0;
  const char* last_fault = "";
  std::vector<Fault> faults;
  std::array<std::uint64_t, kEngines> copied{};
  CostLock mapping_lock, context_lock;

  // --- contexts (contexts.cpp) ---
  Context* find_context(CUcontext handle) const;
  Context* create_context(int device, bool primary, unsigned flags);
  // Waits for the context's work, or drops it with `drop_work`, and destroys all its objects.
  void destroy_context(Lock& lock, Context* context, bool drop_work);
  // Sets the context's sticky error. The pending work of its streams never accesses memory again,
  // so the detector treats it as work that the host has waited for.
  void kill_context(Context& context, CUresult error);
  Stream* per_thread_stream(Context* context);
  StreamPtr add_stream(Context* context, unsigned flags, int priority);

  // --- streams (streams.cpp) ---
  struct Origin {
    std::uint64_t call;
    Function function;
  };
  // Precondition: the stream is not being captured.
  CUresult enqueue(Stream& stream, Work work, const Origin& origin, OperationPtr* out = nullptr,
                   OperationPtr also_after = nullptr);
  void enqueue_wait(Stream& stream, Event& event, const Origin& origin);
  void enqueue_record(Stream& stream, Event& event, const Origin& origin);
  CUresult launch_graph(Stream& stream, GraphExec& exec, const Origin& origin);
  void remove_stream(Lock& lock, const StreamPtr& stream);
  // Collects the operations that the stream's next one must follow under the legacy-stream rules.
  void order(Stream& stream, std::vector<OperationPtr>* after);
  // Returns the vector time of all operations that the stream's next one follows.
  VectorClock clock_of_next(Stream& stream);
  // Blocks until the operation is done. Returns the context's sticky error, or DEINITIALIZED if the
  // process ends meanwhile.
  CUresult wait_for(Lock& lock, const OperationPtr& operation, Context* context);
  // Blocks until no operation is moving bytes. On a GPU a dead context touches no memory; here the
  // program must not learn of the error while a copy is still running.
  void settle(Lock& lock);
  CUresult synchronize_stream(Lock& lock, Stream& stream);
  CUresult synchronize_context(Lock& lock, Context* context);
  // As synchronize_context(), for calls that are not documented to wait: the host's vector clock
  // does not change.
  CUresult drain_context(Lock& lock, Context* context);
  bool stream_done(Stream& stream);
  // Adds the stream's operations to the host's vector clock: the host has waited for all of them.
  void know_stream(Stream& stream);

  // --- time and execution (clock.cpp, concurrent.cpp, execute.cpp) ---
  Nanoseconds now() const;
  // Virtual clock: moves the time to `to` and runs the operations due by then. May release the lock
  // for host functions.
  void advance(Lock& lock, Nanoseconds to);
  void pay(Lock& lock, Nanoseconds cost);
  // Concurrent clock: blocks until then.
  void sleep_until(Lock& lock, Nanoseconds until);
  // Concurrent clock: blocks for the time in which this thread reads `bytes` of a file.
  void host_read(Lock& lock, std::uint64_t bytes);
  void take(Lock& lock, CostLock& wanted);  // blocks
  void give(CostLock& held);
  // Returns the bytes per second that the engine copies now, on all devices together.
  double traffic(Engine engine) const;
  void schedule(Stream& stream, OperationPtr operation);
  void schedule_virtual(const OperationPtr& operation, Nanoseconds not_before);
  // Stops the threads and their current operations. Returns false if a host function does not
  // return within `patience`. No operation runs afterwards.
  bool stop(std::chrono::milliseconds patience);
  bool stopping() const { return stopping_; }

 private:
  void run_stream(StreamPtr stream);
  void execute(Lock& lock, Operation& operation);
  CUresult perform(Lock& lock, Operation& operation, const Work& work);
  CUresult copy(Lock& lock, Operation& operation, const Copy& copy);
  CUresult fill(Lock& lock, Operation& operation, const Fill& fill);
  CUresult launch(Lock& lock, Operation& operation, const Launch& launch);
  void call_back(Lock& lock, Operation& operation, const Callback& callback);
  void complete(Operation& operation, Nanoseconds end);
  struct Span {  // consecutive host memory; null: the content is not kept
    std::byte* at;
    std::uint64_t bytes;
  };
  // Finds the host memory behind a range. Pins the physical allocations of the range and adds them
  // to `pinned`.
  CUresult resolve(const Operation& operation, Address address, std::uint64_t bytes, Place place,
                   bool write, std::vector<Span>* out, std::vector<Physical*>* pinned);
  static void move_bytes(const std::vector<Span>& to, const std::vector<Span>& from);
  // Runs `move` with the lock released, unless the operation races.
  template <class Move>
  void access_memory(Lock& lock, const Operation& operation, Move move);
  void pause(Lock& lock, Nanoseconds until);  // real clock: sleeps with the lock released
  Nanoseconds duration(const Work& work) const;
  Nanoseconds reserve_engine(int device, Engine engine, Nanoseconds ready, Nanoseconds duration);

  void sleep(Lock& lock, Sleeper& self);
  void conduct(Lock& lock, const Sleeper& self);
  void step(Lock& lock);
  double read_rate() const;
  Nanoseconds next_traffic_change() const;

  struct Later {
    bool operator()(const OperationPtr& a, const OperationPtr& b) const {
      return a->end != b->end ? a->end > b->end : a->sequence > b->sequence;
    }
  };
  struct Busy {
    Nanoseconds begin, end;
  };

  const std::chrono::steady_clock::time_point began_;
  Nanoseconds virtual_now_ = 0;
  std::uint64_t next_sequence_ = 0;
  std::vector<OperationPtr> due_;  // virtual clock: a heap by Later
  std::array<std::array<std::vector<Busy>, kEngines>, kMaxDevices> busy_;  // by device
  std::vector<Sleeper*> sleepers_;  // concurrent clock: threads that wait
  bool conducting_ = false;         // one of them moves the clock
  Threads threads_;                 // used by that thread, without the lock
  std::condition_variable done_;    // notified when an operation or thread ends, and by stop()
  std::condition_variable pacing_;  // notified by stop() only
  std::size_t moving_ = 0;          // operations that move bytes without the lock
  std::size_t waiting_ = 0;         // threads that wait for done_
  std::size_t workers_ = 0;         // stream threads that have not ended
  std::vector<StreamPtr> leaving_;  // destroyed streams whose threads are not joined yet
  bool stopping_ = false;
};

// A thread's driver state. Never destroyed, so that calls during the process's exit can use it.
struct ThreadState {
  std::uint64_t generation;  // of the simulator that owns the contexts
  std::uint64_t id;          // of the thread; 0: not assigned yet
  int depth;
  Context* stack[64];
  CUstreamCaptureMode mode;
  bool in_callback;
};
ThreadState& this_thread() noexcept;

// Returns the process's simulator. Makes it from the options in simcuda.conf if it does not exist
// yet; returns null if these are invalid.
Simulator* simulator() noexcept;
// Stops and destroys the simulator, and makes another.
bool replace_simulator(const Options& options, std::string* error);
bool forked() noexcept;             // this process is a child of the one that used the driver
bool exiting() noexcept;            // the process is exiting
void watch_process_end() noexcept;  // called by cuInit
void set_error(std::string text);
const char* last_error() noexcept;

}  // namespace warmserve::simcuda
