// The concurrent clock. A thread that pays a cost, or waits for work, sleeps until the clock
// reaches its time. One of the sleeping threads conducts: whenever all threads of the process
// sleep, it moves the clock to the next time at which one of them or an operation is due. Reads of
// files share the bandwidth of the host's memory, so their ends are known only from step to step.
#include <algorithm>
#include <cmath>

#include "simcuda/simulator.h"

namespace warmserve::simcuda {
namespace {

// Transfers of the host's memory for each byte that the CPU reads from the page cache: the CPU
// reads it, reads the line that it will overwrite, and writes that line back.
constexpr double kReadTransfers = 3;
// The share of the host's memory that its threads have at least, beside copies.
constexpr double kLeastShare = 0.1;
constexpr auto kNap = std::chrono::microseconds(20);  // real time

}  // namespace

void Simulator::sleep(Lock& lock, Sleeper& self) {
  if (!options.concurrent()) {  // waits for another thread, not for a time
    self.wake.wait(lock, [&] { return self.woken || stopping_; });
    return;
  }
  self.thread = this_thread_id();
  sleepers_.push_back(&self);
  while (!self.woken && !stopping_) {
    if (conducting_) {
      self.wake.wait(lock);  // woken, or told to conduct
      continue;
    }
    conducting_ = true;
    conduct(lock, self);
    conducting_ = false;
  }
  std::erase(sleepers_, &self);
  if (conducting_) return;
  const auto next = std::find_if(sleepers_.begin(), sleepers_.end(),
                                 [](const Sleeper* other) { return !other->woken; });
  if (next != sleepers_.end()) (*next)->wake.notify_one();
}

void Simulator::sleep_until(Lock& lock, Nanoseconds until) {
  Sleeper self;
  self.until = until;
  if (until > virtual_now_)
    sleep(lock, self);
  else
    advance(lock, virtual_now_);
}

void Simulator::host_read(Lock& lock, std::uint64_t bytes) {
  if (!options.concurrent() || options.read == 0 || bytes == 0) return;
  Sleeper self;
  self.unread = static_cast<double>(bytes);
  sleep(lock, self);
}

void Simulator::conduct(Lock& lock, const Sleeper& self) {
  while (!self.woken && !stopping_) {
    std::vector<pid_t> asleep;
    bool all = true;
    for (const Sleeper* const sleeper : sleepers_) {
      all = all && !sleeper->woken;
      asleep.push_back(sleeper->thread);
    }
    // Without the lock, so that no thread sleeps only because it waits for the lock.
    lock.unlock();
    all = all && threads_.all_asleep(asleep);
    if (!all) std::this_thread::sleep_for(kNap);
    lock.lock();
    if (all && !stopping_) step(lock);
  }
}

// Moves the clock to the next time at which something is due.
void Simulator::step(Lock& lock) {
  const double rate = read_rate();
  Nanoseconds next = due_.empty() ? kNeverDue : due_.front()->end;
  for (const Sleeper* const sleeper : sleepers_) {
    const auto reading = static_cast<Nanoseconds>(std::ceil(sleeper->unread / rate * 1e9));
    next = std::min({next, sleeper->until, reading > 0 ? virtual_now_ + reading : kNeverDue});
    if (reading > 0) next = std::min(next, next_traffic_change());
  }
  if (next == kNeverDue) return;
  const double read =
      rate * 1e-9 * static_cast<double>(std::max(next - virtual_now_, Nanoseconds{0}));
  for (Sleeper* const sleeper : sleepers_) {
    if (sleeper->unread <= 0) continue;
    sleeper->unread -= read;
    if (sleeper->unread <= 0) sleeper->until = next;
  }
  advance(lock, next);  // may release the lock: other threads may sleep by now
  for (Sleeper* const sleeper : sleepers_) {
    if (sleeper->woken || sleeper->until > virtual_now_) continue;
    sleeper->woken = true;
    sleeper->wake.notify_one();
  }
}

// Returns the bytes per second that each thread now reads out of the page cache.
double Simulator::read_rate() const {
  const auto readers = std::count_if(sleepers_.begin(), sleepers_.end(),
                                     [](const Sleeper* each) { return each->unread > 0; });
  if (readers == 0 || options.dram == 0) return options.read;
  const double left = std::max(options.dram - traffic(Engine::h2d) - traffic(Engine::d2h),
                               kLeastShare * options.dram);
  return std::min(options.read, left / kReadTransfers / static_cast<double>(readers));
}

double Simulator::traffic(Engine engine) const {
  const auto index = static_cast<std::size_t>(engine);
  const Nanoseconds time = now();
  double sum = 0;
  for (const auto& device : busy_)
    for (const Busy& busy : device[index])
      if (busy.begin <= time && time < busy.end) sum += options.rates[index];
  return sum;
}

// Returns when a copy engine next begins or stops to use the host's memory.
Nanoseconds Simulator::next_traffic_change() const {
  Nanoseconds next = kNeverDue;
  if (options.dram == 0) return next;
  for (const auto& device : busy_)
    for (const Engine engine : {Engine::h2d, Engine::d2h})
      for (const Busy& busy : device[static_cast<std::size_t>(engine)])
        for (const Nanoseconds edge : {busy.begin, busy.end})
          if (edge > virtual_now_) next = std::min(next, edge);
  return next;
}

void Simulator::take(Lock& lock, CostLock& wanted) {
  if (!std::exchange(wanted.held, true)) return;
  Sleeper self;
  wanted.queue.push_back(&self);
  const Nanoseconds began = now();
  ++wanted.waits;
  sleep(lock, self);
  std::erase(wanted.queue, &self);  // still there if the simulator stops
  wanted.waited += now() - began;
}

void Simulator::give(CostLock& held) {
  held.held = !held.queue.empty();
  if (!held.held) return;
  Sleeper* const next = held.queue.front();
  held.queue.pop_front();
  next->woken = true;
  next->wake.notify_one();
}

}  // namespace warmserve::simcuda
