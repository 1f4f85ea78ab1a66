// Eight threads run all operations concurrently on more models than fit, and every lease has the
// right bytes.
#include <mutex>
#include <random>
#include <thread>

#include "fixtures.h"

namespace warmserve {
namespace {

constexpr std::uint64_t kThreads = 8;
// The simulated driver checks every byte: 250 rounds take it up to a minute under ASan.
std::uint64_t rounds() {
  if (check::thorough()) return check::simulator() ? 60 : 250;
  return check::simulator() ? 20 : 60;
}
// Four granules per model: layers of exactly one granule, more than one, and less than one.
const std::vector<std::uint64_t> kLayers{kGranule, kGranule + 700'001, 300'000};

// Runs `body` and ignores errors of these kinds, which operations of other threads may cause. Other
// errors end the test.
template <typename Body>
void tolerate(std::initializer_list<ErrorKind> kinds, Body body) {
  try {
    body();
  } catch (const Error& error) {
    if (std::find(kinds.begin(), kinds.end(), error.kind()) == kinds.end()) throw;
  }
}

// Runs body(thread) on all threads concurrently.
template <typename Body>
void on_threads(Body body) {
  std::vector<std::jthread> threads;
  for (std::uint64_t id = 0; id < kThreads; ++id)
    threads.emplace_back([&body, id] {
      try {
        body(id);
      } catch (const std::exception& error) {
        check::fail(__FILE__, __LINE__, std::string("a thread threw: ") + error.what());
      }
    });
  for (std::jthread& thread : threads) thread.join();
}

struct World {
  explicit World(const HostOptions& host)
      : device(host), runtime(Runtime::make(device.driver, options(9))) {
    for (std::uint64_t id = 1; id <= 4; ++id) {
      files.push_back(std::make_unique<ModelFile>(id, kLayers));
      models.push_back(files.back()->register_in(*runtime));
    }
  }
  Watched device;
  std::shared_ptr<Runtime> runtime;
  std::vector<std::unique_ptr<ModelFile>> files;
  std::vector<ModelPtr> models;
};

class Worker {
 public:
  Worker(World& world, std::uint64_t id)
      : world_(world),
        runtime_(*world.runtime),
        owner_(id + 1),
        random_(static_cast<unsigned>(owner_)),
        stream_(std::make_shared<Stream>(runtime_.device())),
        copied_(kGranule) {}

  void round() {
    const std::size_t a = pick(4), b = (a + 1 + pick(3)) % 4;
    const ModelPtr &model = world_.models[a], &other = world_.models[b];
    const bool impatient = pick(4) == 0;
    using enum ErrorKind;
    switch (pick(16)) {
      case 0:
      case 1: return lease({a}, impatient);
      case 2: return lease({a, b}, impatient);
      case 3: return lease_and_go_on_copying(a);
      case 4: return tolerate({busy}, [&] { ticket_ = runtime_.prewarm(model, kBackground); });
      case 5:
        if (ticket_)
          tolerate({busy, cancelled, timeout}, [&] { runtime_.wait(ticket_, in(kSoon), nullptr); });
        return;
      case 6:
        if (ticket_) runtime_.cancel(ticket_);
        return;
      case 7: return tolerate({busy}, [&] { runtime_.evict(model, in(kLong), nullptr); });
      case 8:
        return tolerate({busy, cancelled}, [&] {
          runtime_.wait(runtime_.swap(model, other, kForeground), in(kLong), nullptr);
        });
      case 9: runtime_.set_keep_value(model, static_cast<double>(pick(3))); return;
      case 10: runtime_.trim(); return;
      case 11: return inspect(a);
      case 12:
      case 13: return stream_in(a);
      case 14: return tolerate({busy}, [&] { ticket_ = runtime_.prewarm(some(a), kBackground); });
      case 15:
        return tolerate({busy, timeout}, [&] {
          const WaitFor wait_for[] = {WaitFor::none, WaitFor::streams, WaitFor::leases_and_streams};
          runtime_.evict(some(a), in(kSoon), nullptr, wait_for[pick(3)]);
        });
    }
  }

 private:
  std::size_t pick(unsigned below) { return random_() % below; }

  void compare(std::size_t index) {
    if (!world_.files[index]->is_in(runtime_, world_.models[index]))
      check::fail(__FILE__, __LINE__, "wrong bytes under a lease");
  }

  void lease(std::vector<std::size_t> indices, bool impatient) {
    std::vector<Selection> wants;
    for (const std::size_t index : indices) wants.emplace_back(world_.models[index]);
    const LeasePtr lease = runtime_.begin_lease(wants, owner_);
    try {
      runtime_.await_lease(lease, in(impatient ? kSoon : kLong), nullptr);
    } catch (const Error& error) {
      if (impatient && error.kind() == ErrorKind::timeout) return;
      throw;
    }
    for (const std::size_t index : indices) compare(index);
    std::this_thread::yield();
    for (const std::size_t index : indices) compare(index);
    runtime_.end_lease(lease);
  }

  // The stream still reads after the lease has ended; its memory must not be unmapped meanwhile.
  void lease_and_go_on_copying(std::size_t index) {
    {
      const Leased leased(runtime_, {world_.models[index]}, owner_);
      const Address from = runtime_.reservation(world_.models[index])->address();
      stream_->copy_from_device(copied_.data(), from, kGranule);
      runtime_.record(leased.lease(), stream_);
    }
    if (pick(2))
      tolerate({ErrorKind::busy},
               [&] { runtime_.evict(world_.models[index], in(kLong), nullptr); });
    stream_->synchronize();
    CHECK(world_.files[index]->equals(0, copied_.data()));
  }

  Selection some(std::size_t index) {
    LayerSet layers;
    for (std::uint32_t i = 0; i < kLayers.size(); ++i)
      if (pick(2)) layers.insert(i);
    if (layers.empty()) layers.insert(0);
    return {world_.models[index], layers};
  }

  // The stream reads each layer as early as possible, while other layers are still being loaded.
  void stream_in(std::size_t index) {
    const Selection wanted = pick(2) ? some(index) : Selection(world_.models[index]);
    const LeasePtr first = runtime_.begin_lease({wanted}, owner_);
    runtime_.await_lease(first, in(kLong), nullptr, false);
    const LeasePtr lease = pick(2) ? runtime_.share_lease(first, owner_) : first;
    if (lease != first) runtime_.end_lease(first);
    wanted.for_each([&](const Layer& layer) {
      const std::uint64_t bytes = std::min(layer.bytes, kGranule);
      runtime_.await_layer(lease, wanted.model, layer.index, pick(2) ? stream_ : nullptr, in(kLong),
                           nullptr);
      stream_->copy_from_device(
          copied_.data(), runtime_.reservation(wanted.model)->address() + layer.offset, bytes);
      stream_->synchronize();
      CHECK(world_.files[index]->begins(layer.index, copied_.data(), bytes));
    });
    runtime_.record(lease, stream_);
    runtime_.end_lease(lease);
  }

  void inspect(std::size_t index) {
    runtime_.check_invariants();
    const RuntimeState state = runtime_.state();
    CHECK(state.granules_free + state.granules_trimmed <= state.granules);
    CHECK(state.pinned_bytes <= options(1).staging_bytes);
    tolerate({ErrorKind::stale_view}, [&] {
      runtime_.read_back(world_.models[index], 0, copied_.data());
      CHECK(world_.files[index]->equals(0, copied_.data()));
    });
  }

  World& world_;
  Runtime& runtime_;
  const std::uint64_t owner_;
  std::minstd_rand random_;
  const std::shared_ptr<Stream> stream_;
  std::vector<std::byte> copied_;
  TicketPtr ticket_;
};

void mix(const HostOptions& host) {
  World world(host);
  on_threads([&](std::uint64_t id) {
    Worker worker(world, id);
    for (std::uint64_t i = 0; i < rounds(); ++i) worker.round();
  });
  world.device.expect_kept();
  for (const ModelPtr& model : world.models) world.runtime->evict(model, in(kLong), nullptr);
  world.runtime->check_invariants();
  const RuntimeState state = world.runtime->state();
  CHECK(state.granules_free + state.granules_trimmed == state.granules);
  CHECK(state.leases == 0);
  world.runtime->close(nullptr);
  world.runtime.reset();
  world.models.clear();
  world.device.expect_returned();
}

}  // namespace

TEST(threads_can_mix_operations_with_host_views) { mix({}); }
TEST(threads_can_mix_operations_with_staging) { mix({.host_view = false}); }

// Two threads unregister and re-register models that the others are using.
TEST(threads_can_replace_models_that_others_use) {
  using enum ErrorKind;
  Watched device({.host_view = false});
  auto runtime = Runtime::make(device.driver, options(6));
  const ModelFile files[] = {{1, kLayers}, {2, kLayers}};
  std::mutex mutex;
  ModelPtr shared[] = {files[0].register_in(*runtime), files[1].register_in(*runtime)};
  on_threads([&](std::uint64_t id) {
    const std::size_t which = id % 2;
    for (std::uint64_t i = 0; i < rounds(); ++i) {
      ModelPtr model;
      {
        const std::lock_guard lock(mutex);
        model = shared[which];
      }
      if (id < 2) {
        bool gone = false;
        tolerate({busy}, [&] {
          runtime->unregister(model, in(kLong), nullptr);
          gone = true;
        });
        if (!gone) continue;
        const std::lock_guard lock(mutex);
        shared[which] = files[which].register_in(*runtime);
        continue;
      }
      tolerate({busy, cancelled, invalid_argument}, [&] {
        if (i % 4 == 0) {
          runtime->prewarm(model, kBackground);
          return;
        }
        const Leased leased(*runtime, {model}, id);
        CHECK(files[which].is_in(*runtime, model));
      });
      runtime->check_invariants();
    }
  });
  runtime->close(nullptr);
  runtime.reset();
  for (ModelPtr& model : shared) model.reset();
  device.expect_returned();
}

// A loader that is about to sleep must see a request that arrives at that time. The layer has no
// bytes, so it is loaded and evicted at once and requests arrive at the highest rate.
TEST(a_loader_misses_no_request_before_it_sleeps) {
  for (const bool host_view : {true, false}) {
    const Watched device({.host_view = host_view});
    const auto runtime = Runtime::make(device.driver, options(1, 1));
    const ModelFile file(1, {0});
    const ModelPtr model = file.register_in(*runtime);
    for (int i = 0; i < 30'000; ++i) {
      runtime->wait(runtime->prewarm(model, kBackground), in(std::chrono::seconds(10)), nullptr);
      runtime->evict(model, in(kLong), nullptr);
    }
  }
}

}  // namespace warmserve
