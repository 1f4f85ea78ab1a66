// Time and the scheduling of operations. With the real clock each stream has a thread. With the
// virtual clock only calls advance time: an operation's end is known when it is enqueued, and the
// operation runs when the clock reaches it. concurrent.cpp has what the concurrent clock adds.
#include <algorithm>
#include <cmath>
#include <system_error>

#include "simcuda/simulator.h"

namespace warmserve::simcuda {
namespace {

constexpr Nanoseconds kSpin = 100'000;  // the last part of a cost is spun; sleeps overshoot by this

}  // namespace

Nanoseconds Simulator::now() const {
  if (options.virtual_clock()) return virtual_now_;
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() -
                                                              began_)
      .count();
}

void Simulator::pause(Lock& lock, Nanoseconds until) {
  if (now() >= until) return;
  pacing_.wait_until(lock, began_ + std::chrono::nanoseconds(until), [&] { return stopping_; });
}

void Simulator::pay(Lock& lock, Nanoseconds cost) {
  if (options.concurrent()) return sleep_until(lock, virtual_now_ + cost);
  if (options.virtual_clock()) return advance(lock, virtual_now_ + cost);
  if (cost <= 0) return;
  lock.unlock();
  const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(cost);
  if (cost > kSpin) std::this_thread::sleep_until(until - std::chrono::nanoseconds(kSpin));
  while (std::chrono::steady_clock::now() < until) {
  }
  lock.lock();
}

Nanoseconds Simulator::duration(const Work& work) const {
  if (const auto* copy = std::get_if<Copy>(&work)) {
    const double rate = options.rates[static_cast<std::size_t>(copy->engine())];
    if (rate <= 0) return 0;
    return options.copy_start + static_cast<Nanoseconds>(std::llround(copy->bytes / rate * 1e9));
  }
  return std::holds_alternative<Launch>(work) ? options.launch : 0;
}

// Reserves the engine for the first free interval of `length` from `ready` on. Returns its end.
Nanoseconds Simulator::reserve_engine(int device, Engine engine, Nanoseconds ready,
                                      Nanoseconds length) {
  std::vector<Busy>& busy =
      busy_[static_cast<std::size_t>(device)][static_cast<std::size_t>(engine)];
  const Nanoseconds past = now();
  std::erase_if(busy, [&](const Busy& taken) { return taken.end <= past; });
  Nanoseconds begin = ready;
  auto next = busy.begin();
  for (; next != busy.end() && next->begin < begin + length; ++next)
    begin = std::max(begin, next->end);
  const Nanoseconds end = begin + length;
  next = busy.insert(next, {begin, end});
  // Merge adjacent intervals.
  if (next + 1 != busy.end() && (next + 1)->begin == end) {
    next->end = (next + 1)->end;
    busy.erase(next + 1);
  }
  if (next != busy.begin() && (next - 1)->end == begin) {
    (next - 1)->end = next->end;
    busy.erase(next);
  }
  return end;
}

void Simulator::schedule_virtual(const OperationPtr& operation, Nanoseconds not_before) {
  Nanoseconds ready = not_before;
  for (const OperationPtr& before : operation->after) ready = std::max(ready, before->end);
  const Nanoseconds length = duration(operation->work);
  const auto* copy = std::get_if<Copy>(&operation->work);
  operation->end = copy && length > 0
                       ? reserve_engine(operation->context->device, copy->engine(), ready, length)
                       : ready + length;
  operation->sequence = next_sequence_++;
  due_.push_back(operation);
  std::push_heap(due_.begin(), due_.end(), Later{});
}

void Simulator::schedule(Stream& stream, OperationPtr operation) {
  const OperationPtr before = std::exchange(stream.tail, operation);
  if (options.virtual_clock()) {
    if (before && !before->done) operation->after.push_back(before);
    schedule_virtual(operation, virtual_now_);
    return;
  }
  // A marker in an idle stream completes at once, without a thread.
  if (std::holds_alternative<Marker>(operation->work) && stream.queue.empty() &&
      std::all_of(operation->after.begin(), operation->after.end(),
                  [](const OperationPtr& other) { return other->done; })) {
    complete(*operation, now());
    return;
  }
  stream.queue.push_back(std::move(operation));
  if (stream.thread.joinable()) {
    stream.wake.notify_one();
  } else {
    const StreamPtr self =
        stream.legacy
            ? stream.context->legacy
            : *std::find_if(stream.context->streams.begin(), stream.context->streams.end(),
                            [&](const StreamPtr& s) { return s.get() == &stream; });
    try {
      stream.thread = std::thread(&Simulator::run_stream, this, self);
      ++workers_;
    } catch (const std::system_error&) {
      // No thread could be started: the context dies, and its queued operations count as complete
      // so that no call waits for them.
      kill_context(*stream.context, CUDA_ERROR_OPERATING_SYSTEM);
      for (const OperationPtr& lost : std::exchange(stream.queue, {})) complete(*lost, now());
    }
  }
}

void Simulator::advance(Lock& lock, Nanoseconds to) {
  while (!due_.empty() && due_.front()->end <= to && !stopping_) {
    std::pop_heap(due_.begin(), due_.end(), Later{});
    const OperationPtr operation = std::move(due_.back());
    due_.pop_back();
    virtual_now_ = std::max(virtual_now_, operation->end);
    // Another thread that advances the clock may still be running the operations before this one.
    const auto ready = [&] {
      return std::all_of(operation->after.begin(), operation->after.end(),
                         [](const OperationPtr& other) { return other->done; });
    };
    if (!ready()) {
      ++waiting_;
      done_.wait(lock, [&] { return ready() || stopping_; });
      --waiting_;
    }
    execute(lock, *operation);
    complete(*operation, operation->end);
  }
  virtual_now_ = std::max(virtual_now_, to);
}

void Simulator::complete(Operation& operation, Nanoseconds end) {
  operation.done = true;
  operation.end = end;
  operation.work = Marker{};  // frees the content that the work holds
  operation.after.clear();
  if (waiting_ > 0) done_.notify_all();
}

void Simulator::run_stream(StreamPtr stream) {
  Lock lock(mutex);
  for (;;) {
    stream->wake.wait(lock, [&] { return !stream->queue.empty() || stream->closed || stopping_; });
    if (stopping_ || stream->queue.empty()) break;
    const OperationPtr operation = stream->queue.front();
    for (const OperationPtr& before : operation->after) {
      ++waiting_;
      done_.wait(lock, [&] { return before->done || stopping_; });
      --waiting_;
    }
    if (stopping_) break;
    execute(lock, *operation);
    if (stopping_) break;
    stream->queue.pop_front();
    complete(*operation, now());
  }
  stream->ended = true;
  --workers_;
  done_.notify_all();
}

bool Simulator::stop(std::chrono::milliseconds patience) {
  std::vector<StreamPtr> all;
  {
    Lock lock(mutex);
    stopping_ = true;
    for (const auto& context : contexts) {
      all.push_back(context->legacy);
      all.insert(all.end(), context->streams.begin(), context->streams.end());
    }
    all.insert(all.end(), leaving_.begin(), leaving_.end());
    for (const StreamPtr& stream : all) stream->wake.notify_all();
    for (Sleeper* const sleeper : sleepers_) sleeper->wake.notify_all();
    for (CostLock* const held : {&mapping_lock, &context_lock})
      for (Sleeper* const sleeper : held->queue) sleeper->wake.notify_all();
    pacing_.notify_all();
    done_.notify_all();
    if (!done_.wait_for(lock, patience, [&] { return workers_ == 0; })) return false;
  }
  for (const StreamPtr& stream : all) {
    if (stream->thread.joinable()) stream->thread.join();
    stream->queue.clear();
  }
  return true;
}

}  // namespace warmserve::simcuda
