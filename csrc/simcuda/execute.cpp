// The execution of an operation. The page table is read when the operation runs, not when it is
// enqueued.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "simcuda/call.h"

namespace warmserve::simcuda {
namespace {

// Estimated bytes per second of the simulator's own copies. A paced copy reads its source as late
// as possible while still ending on time.
constexpr double kOwnRate = 3e9;

}  // namespace

void Simulator::execute(Lock& lock, Operation& operation) {
  Context& context = *operation.context;
  if (context.destroyed || context.sticky != CUDA_SUCCESS) {
    // Callbacks of cuStreamAddCallback still run, host functions do not [D h:18127].
    const auto* callback = std::get_if<Callback>(&operation.work);
    if (callback && callback->stream_function) call_back(lock, operation, *callback);
    return;
  }
  const CUresult result = perform(lock, operation, operation.work);
  if (result != CUDA_SUCCESS) kill_context(context, result);
}

CUresult Simulator::perform(Lock& lock, Operation& operation, const Work& work) {
  if (const auto* what = std::get_if<Copy>(&work)) return copy(lock, operation, *what);
  if (const auto* what = std::get_if<Fill>(&work)) return fill(lock, operation, *what);
  if (const auto* what = std::get_if<Launch>(&work)) return launch(lock, operation, *what);
  if (const auto* what = std::get_if<Callback>(&work)) call_back(lock, operation, *what);
  if (const auto* what = std::get_if<GraphRun>(&work)) {
    for (const Node& node : what->graph->nodes) {
      const CUresult result = perform(lock, operation, node.work);
      if (result != CUDA_SUCCESS || stopping_) return result;
    }
  }
  return CUDA_SUCCESS;
}

CUresult Simulator::resolve(const Operation& operation, Address address, std::uint64_t bytes,
                            Place place, bool write, std::vector<Span>* out,
                            std::vector<Physical*>* pinned) {
  const auto vanished = [&](const char* kind, const char* what) {
    char text[128];
    std::snprintf(text, sizeof text, "%s when the operation ran: 0x%" PRIx64, what, address);
    if (detector.on()) detector.violation(kind, text, operation.call);
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  };
  if (place == Place::pageable) {
    out->push_back({reinterpret_cast<std::byte*>(address), bytes});
    return CUDA_SUCCESS;
  }
  if (place == Place::pinned) {
    if (memory.place(address, bytes) != Place::pinned)
      return vanished("use-while-unmapped", "memory was not pinned any more");
    if (write && memory.pinned_at(address)->read_only()) return CUDA_ERROR_ILLEGAL_ADDRESS;
    std::byte* const at = memory.reach(*memory.pinned_at(address), address, bytes);
    if (!at) return vanished("misuse", "host memory was unmapped without being unregistered");
    out->push_back({at, bytes});
    return CUDA_SUCCESS;
  }
  std::vector<Piece> pieces;
  if (!memory.walk(address, bytes, &pieces))
    return vanished("use-while-unmapped", "no memory was mapped");
  const int need = write ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ;
  const std::uint64_t kept = memory.kept();
  for (const Piece& piece : pieces) {
    if ((piece.mapping->access[operation.context->device] & need) != need)
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    Physical* const physical = piece.mapping->physical;
    const std::uint64_t end = std::min<std::uint64_t>(piece.end, kept);
    if (piece.begin < end) {
      if (pinned->empty() || pinned->back() != physical) {
        memory.pin(physical);
        pinned->push_back(physical);
      }
      std::byte* const at = memory.slot(*physical, piece.page) + piece.begin;
      if (!out->empty() && out->back().at && out->back().at + out->back().bytes == at) {
        out->back().bytes += end - piece.begin;
      } else {
        out->push_back({at, end - piece.begin});
      }
    }
    if (piece.end > kept)
      out->push_back({nullptr, piece.end - std::max<std::uint64_t>(piece.begin, kept)});
  }
  return CUDA_SUCCESS;
}

void Simulator::move_bytes(const std::vector<Span>& to, const std::vector<Span>& from) {
  auto target = to.begin();
  auto source = from.begin();
  std::uint64_t written = 0, read = 0;
  while (target != to.end() && source != from.end()) {
    const std::uint64_t bytes = std::min(target->bytes - written, source->bytes - read);
    if (target->at && source->at) std::memmove(target->at + written, source->at + read, bytes);
    if (target->at && !source->at) std::memset(target->at + written, 0, bytes);
    if ((written += bytes) == target->bytes) ++target, written = 0;
    if ((read += bytes) == source->bytes) ++source, read = 0;
  }
}

// Runs `move`, which accesses the operation's memory, without the lock. An operation that races
// keeps the lock and runs while no other operation moves bytes: the simulator reports the program's
// race and must not have a data race of its own.
template <class Move>
void Simulator::access_memory(Lock& lock, const Operation& operation, Move move) {
  if (operation.races) {
    settle(lock);
    move();
    return;
  }
  ++moving_;
  lock.unlock();
  move();
  lock.lock();
  if (--moving_ == 0 && waiting_ > 0) done_.notify_all();
}

CUresult Simulator::copy(Lock& lock, Operation& operation, const Copy& copy) {
  Nanoseconds end = 0;
  if (const Nanoseconds length = duration(copy); length > 0 && !options.virtual_clock()) {
    end = reserve_engine(operation.context->device, copy.engine(), now(), length);
    pause(lock, end - std::min(length, static_cast<Nanoseconds>(copy.bytes / kOwnRate * 1e9)));
    if (stopping_ || state_of(*operation.context) != CUDA_SUCCESS) return CUDA_SUCCESS;
  }
  std::vector<Span> to, from;
  std::vector<Physical*> pinned;
  CUresult result = CUDA_SUCCESS;
  if (copy.snapshot) {
    from.push_back({const_cast<std::byte*>(copy.snapshot->data()), copy.bytes});
  } else {
    result = resolve(operation, copy.from, copy.bytes, copy.from_place, false, &from, &pinned);
  }
  if (result == CUDA_SUCCESS)
    result = resolve(operation, copy.to, copy.bytes, copy.to_place, true, &to, &pinned);
  if (result == CUDA_SUCCESS) {
    access_memory(lock, operation, [&] { move_bytes(to, from); });
    copied[static_cast<std::size_t>(copy.engine())] += copy.bytes;
  }
  for (Physical* const physical : pinned) memory.unpin(physical);
  if (end > 0) pause(lock, end);
  // The error code of a copy engine's fault differs from that of a kernel's fault.
  return result == CUDA_ERROR_ILLEGAL_ADDRESS ? CUDA_ERROR_LAUNCH_FAILED : result;
}

CUresult Simulator::fill(Lock& lock, Operation& operation, const Fill& fill) {
  std::vector<Span> to;
  std::vector<Physical*> pinned;
  const CUresult result = resolve(operation, fill.to, fill.bytes, fill.place, true, &to, &pinned);
  const auto write = [&] {
    std::uint64_t done = 0;  // bytes filled so far; a span may begin inside an element
    for (const Span& span : to) {
      if (span.at && fill.width == 1) {
        std::memset(span.at, static_cast<int>(fill.value), span.bytes);
      } else if (span.at) {
        for (std::uint64_t i = 0; i < span.bytes; ++i)
          span.at[i] = static_cast<std::byte>(fill.value >> 8 * ((done + i) % fill.width));
      }
      done += span.bytes;
    }
  };
  if (result == CUDA_SUCCESS) access_memory(lock, operation, write);
  for (Physical* const physical : pinned) memory.unpin(physical);
  return result;
}

// Runs a kernel. The kernel's code needs each range contiguous. Granules that are adjacent in the
// address space are seldom adjacent in the store, so such ranges are copied through a buffer.
CUresult Simulator::launch(Lock& lock, Operation& operation, const Launch& launch) {
  if (launch.broken != CUDA_SUCCESS) return launch.broken;
  struct Range {
    std::vector<Span> spans;
    std::vector<std::byte> buffer;
  };
  const Nanoseconds began = now();
  const std::vector<Touched> ranges = touched(launch.call);
  std::vector<Range> resolved(ranges.size());
  std::vector<Physical*> pinned;
  CUresult result = CUDA_SUCCESS;
  for (std::size_t i = 0; i < ranges.size() && result == CUDA_SUCCESS; ++i) {
    const auto& [address, bytes, write] = ranges[i];
    if (bytes == 0) continue;
    const Place place = memory.place(address, bytes);
    // The device cannot access pageable host memory (attribute PAGEABLE_MEMORY_ACCESS is 0).
    result = place == Place::device || place == Place::pinned
                 ? resolve(operation, address, bytes, place, write, &resolved[i].spans, &pinned)
                 : CUDA_ERROR_ILLEGAL_ADDRESS;
    if (result != CUDA_SUCCESS && place == Place::pageable && detector.on())
      detector.violation("use-while-unmapped",
                         "a kernel accessed memory that the device cannot reach", operation.call);
  }
  const auto run = [&] {
    std::vector<Address> addresses;
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      Range& range = resolved[i];
      if (range.spans.size() == 1 && range.spans[0].at) {
        addresses.push_back(reinterpret_cast<Address>(range.spans[0].at));
        continue;
      }
      range.buffer.resize(ranges[i].bytes);
      move_bytes({{range.buffer.data(), range.buffer.size()}}, range.spans);
      addresses.push_back(reinterpret_cast<Address>(range.buffer.data()));
    }
    run_on_cpu(rebased(launch.call, addresses));
    for (std::size_t i = 0; i < ranges.size(); ++i)
      if (ranges[i].write && !resolved[i].buffer.empty())
        move_bytes(resolved[i].spans, {{resolved[i].buffer.data(), resolved[i].buffer.size()}});
  };
  if (result == CUDA_SUCCESS) access_memory(lock, operation, run);
  for (Physical* const physical : pinned) memory.unpin(physical);
  if (!options.virtual_clock() && options.launch > 0) pause(lock, began + options.launch);
  return result;
}

void Simulator::call_back(Lock& lock, Operation& operation, const Callback& callback) {
  const CUresult state =
      operation.context->destroyed ? CUDA_ERROR_CONTEXT_IS_DESTROYED : operation.context->sticky;
  lock.unlock();
  bool& inside = this_thread().in_callback;
  const bool before = std::exchange(inside, true);
  if (callback.stream_function) {
    callback.stream_function(callback.stream, state, callback.data);
  } else {
    callback.function(callback.data);
  }
  inside = before;
  lock.lock();
}

}  // namespace warmserve::simcuda
