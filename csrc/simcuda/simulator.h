// The simulated driver: one object with everything in it, and the rules of its life.
//
// One mutex guards all of it. It is dropped while an operation moves bytes, while a host function
// of the program runs, and while a call waits or pays what it costs; nothing of the program's is
// ever called with it held. Nothing is locked under it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "simcuda/detector.h"
#include "simcuda/handles.h"

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

  OperationPtr tail;  // the last enqueued, or null
  Agent agent = 0;
  VectorClock clock;

  std::shared_ptr<Capture> capture;     // that it takes part in
  std::vector<std::uint32_t> frontier;  // nodes that its next one comes after
  std::uint32_t chain = 0;

  // Real clock only: the thread that runs it, from its first operation that needs one.
  std::deque<OperationPtr> queue;
  std::condition_variable wake;
  bool closed = false;  // ends when the queue is empty
  bool ended = false;
  std::thread thread;
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  Context* context = nullptr;
  unsigned flags = 0;
  OperationPtr operation;  // of the last recording; null: never recorded
  VectorClock clock;
  std::shared_ptr<Capture> capture;  // last recorded there; it may be over
  std::vector<std::uint32_t> frontier;
};

// Work of a stream that was destroyed.
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
  std::set<StreamPtr> streams;  // besides the legacy one; per-thread ones too
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
  std::vector<Agent> agents;  // one for each chain
  OperationPtr last;          // launches of one exec come one after the other
  VectorClock clock;
};

struct Fault {
  std::size_t function;  // kFunctions: any
  std::uint64_t first, last;
  CUresult error;
};

class Simulator {
 public:
  explicit Simulator(const Options& options);
  ~Simulator();  // stop() has been called

  const Options options;
  const std::uint64_t generation;  // no two simulators of a process have the same
  std::mutex mutex;                // guards all that follows

  bool initialised = false;
  Memory memory;
  Detector detector;
  std::vector<Device> devices;
  std::vector<std::unique_ptr<Context>> contexts;  // destroyed ones too: threads may hold them
  Handles<CUstream, Stream> streams;
  Handles<CUevent, Event> events;
  Handles<CUmodule, Module> modules;
  Handles<CUfunction, Kernel> kernels;
  Handles<CUgraph, GraphObject> graphs;
  Handles<CUgraphExec, GraphExec> execs;
  std::vector<std::shared_ptr<Capture>> captures;             // those under way
  std::unordered_map<std::uint64_t, std::uint64_t> exported;  // inode of a descriptor, handle

  std::uint64_t calls = 0;
  std::array<std::uint64_t, kFunctions> called{}, called_since_clear{};
  std::uint64_t calls_since_clear = 0, injected = 0;
  const char* last_fault = "";
  std::vector<Fault> faults;
  std::array<std::uint64_t, kEngines> copied{};

  // --- contexts (contexts.cpp) ---
  Context* find_context(CUcontext handle) const;
  Context* create_context(int device, bool primary, unsigned flags);
  // Lets its work end, unless it is dropped, and takes all of its objects away.
  void destroy_context(Lock& lock, Context* context, bool drop_work);
  // It dies of an error, and with it all that its streams would have done: none of that needs to be
  // waited for any more.
  void kill_context(Context& context, CUresult error);
  Stream* per_thread_stream(Context* context);
  StreamPtr add_stream(Context* context, unsigned flags, int priority);

  // --- streams (streams.cpp) ---
  struct Origin {
    std::uint64_t call;
    Function function;
  };
  // The stream is not being captured.
  CUresult enqueue(Stream& stream, Work work, const Origin& origin, OperationPtr* out = nullptr,
                   OperationPtr also_after = nullptr);
  void enqueue_wait(Stream& stream, Event& event, const Origin& origin);
  void enqueue_record(Stream& stream, Event& event, const Origin& origin);
  CUresult launch_graph(Stream& stream, GraphExec& exec, const Origin& origin);
  void remove_stream(Lock& lock, const StreamPtr& stream);
  // All that legacy-stream rules make this stream's next operation come after.
  void order(Stream& stream, std::vector<OperationPtr>* after);
  // All that this stream's next operation comes after, in vector time.
  VectorClock clock_of_next(Stream& stream);
  // Blocks. What the context died of, or DEINITIALIZED where the process ends meanwhile.
  CUresult wait_for(Lock& lock, const OperationPtr& operation, Context* context);
  // Blocks until no operation is moving bytes. On a machine with a GPU a dead context touches
  // nothing; here the program must not be told of the death while a copy is in its middle.
  void settle(Lock& lock);
  CUresult synchronize_stream(Lock& lock, Stream& stream);
  CUresult synchronize_context(Lock& lock, Context* context);
  // The same, where nothing promises that the call waits: the host knows no more than before.
  CUresult drain_context(Lock& lock, Context* context);
  bool stream_done(Stream& stream);
  void know_stream(Stream& stream);  // the host has waited for all that is in it

  // --- time and execution (clock.cpp, execute.cpp) ---
  Nanoseconds now() const;
  // Virtual clock: time passes, and what is due by then runs. May drop the lock for host functions.
  void advance(Lock& lock, Nanoseconds to);
  void pay(Lock& lock, Nanoseconds cost);
  void schedule(Stream& stream, OperationPtr operation);
  void schedule_virtual(const OperationPtr& operation, Nanoseconds not_before);
  // Stops the threads, with what they are doing; false where a host function does not return
  // within the time. No operation runs after this.
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
  struct Span {  // consecutive host memory; null: content that is not kept
    std::byte* at;
    std::uint64_t bytes;
  };
  // Where the bytes of a range are now; what they belong to is pinned and added to `pinned`.
  CUresult resolve(const Operation& operation, Address address, std::uint64_t bytes, Place place,
                   bool write, std::vector<Span>* out, std::vector<Physical*>* pinned);
  static void move_bytes(const std::vector<Span>& to, const std::vector<Span>& from);
  // Drops the lock meanwhile, unless the operation races.
  template <class Move>
  void access_memory(Lock& lock, const Operation& operation, Move move);
  void pause(Lock& lock, Nanoseconds until);  // real clock: sleeps, dropping the lock
  Nanoseconds duration(const Work& work) const;
  Nanoseconds reserve_engine(int device, Engine engine, Nanoseconds ready, Nanoseconds duration);

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
  std::condition_variable done_;    // an operation is done, a thread has ended, or stop()
  std::condition_variable pacing_;  // stop() alone
  std::size_t moving_ = 0;          // operations that move bytes, without the lock
  std::size_t waiting_ = 0;         // threads that wait for done_
  std::size_t workers_ = 0;         // threads that have not ended
  std::vector<StreamPtr> leaving_;  // destroyed streams whose threads are not joined
  bool stopping_ = false;
};

// What a thread knows of the driver. Never destroyed, so that it is there while a process ends.
struct ThreadState {
  std::uint64_t generation;  // of the simulator that the contexts are of
  std::uint64_t id;          // of the thread; 0: not given yet
  int depth;
  Context* stack[64];
  CUstreamCaptureMode mode;
  bool in_callback;
};
ThreadState& this_thread() noexcept;

// The simulator there is, begun with the options of simcuda.conf where there is none. Null where
// those are bad.
Simulator* simulator() noexcept;
// Replaces it; the old one is stopped and destroyed.
bool replace_simulator(const Options& options, std::string* error);
bool forked() noexcept;             // this process is a child of the one that used the driver
bool exiting() noexcept;            // the process ends
void watch_process_end() noexcept;  // from cuInit on
void set_error(std::string text);
const char* last_error() noexcept;

}  // namespace warmserve::simcuda
