// Bytes that arrive over a peer's link are correct, whatever happens to the peer
// meanwhile.
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <thread>

#include "fixtures.h"
#include "load/peer_route.h"

namespace warmserve {
namespace {

const std::vector<std::uint64_t> kLayers{2 * kGranule, kGranule + 700'001, 3 * kGranule};
constexpr std::uint32_t kGranules = 7;
const HostOptions kStaged{true, false, true};

// A runtime with a model, and a peer of its device.
struct Bench {
  explicit Bench(unsigned loaders = 2)
      : device(kStaged), runtime(Runtime::make(device.driver, options(kGranules, loaders))) {
    model = file.register_in(*runtime);
  }
  ~Bench() {
    runtime->check_invariants();
    model.reset();
    runtime.reset();
    device.expect_returned();
    if (peer_lost)
      peer.expect_kept();
    else
      peer.expect_returned();
  }
  void connect() {
    runtime->add_route(
        make_peer_route(std::make_shared<Device>(peer.driver), *runtime->device(), 512 * kKiB));
  }
  void load(int priority = kForeground) {
    runtime->evict(model, in(kLong), nullptr);
    runtime->wait(runtime->prewarm(model, priority), in(kLong), nullptr);
    runtime->check_invariants();
    const Leased leased(*runtime, {model});
    CHECK(file.is_in(*runtime, model));
  }
  RouteState route() { return runtime->state().routes.at(0); }

  Watched device, peer;
  std::shared_ptr<Runtime> runtime;
  ModelFile file{1, kLayers};
  ModelPtr model;
  bool peer_lost = false;
};

// A route whose thread acts as the test prescribes.
class Scripted final : public Route {
 public:
  enum class Act { carry, spoil, refuse, full };
  struct Sent final : RouteCopy {
    State poll(Deadline until, std::string* why) noexcept override {
      while (state == State::moving && Clock::now() < until) std::this_thread::yield();
      if (state == State::failed) *why = "it was told to";
      return state;
    }
    std::atomic<State> state{State::moving};
  };

  explicit Scripted(std::string name, std::function<Act(int piece)> script)
      : name_(std::move(name)), script_(std::move(script)), thread_([this] { run(); }) {}
  ~Scripted() override {
    stop_ = true;
    thread_.join();
    CHECK(queue_.empty());  // no copies are in flight
  }
  const std::string& name() const noexcept override { return name_; }
  std::shared_ptr<RouteCopy> begin(std::span<const Copy> copies) override {
    const Act act = script_(pieces_++);
    if (act == Act::refuse) throw Error(ErrorKind::general, "it was told to refuse");
    if (act == Act::full) return nullptr;
    const auto sent = std::make_shared<Sent>();
    const std::lock_guard lock(mutex_);
    queue_.push_back({sent, {copies.begin(), copies.end()}, act});
    return sent;
  }
  std::atomic<bool> held{false};  // true: copies make no progress

 private:
  struct Task {
    std::shared_ptr<Sent> sent;
    std::vector<Copy> copies;
    Act act;
  };
  void run() {
    while (!stop_) {
      std::optional<Task> task;
      {
        const std::lock_guard lock(mutex_);
        if (!held && !queue_.empty()) {
          task = std::move(queue_.front());
          queue_.pop_front();
        }
      }
      if (!task) {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
        continue;
      }
      for (const Copy& copy : task->copies) {
        const auto to = reinterpret_cast<std::byte*>(copy.to);
        if (task->act == Act::carry)
          std::memcpy(to, copy.from, copy.bytes);
        else
          std::memset(to, 0xee, copy.bytes / 2);
      }
      task->sent->state =
          task->act == Act::carry ? RouteCopy::State::arrived : RouteCopy::State::failed;
    }
  }
  const std::string name_;
  const std::function<Act(int)> script_;
  int pieces_ = 0;
  std::mutex mutex_;
  std::deque<Task> queue_;
  std::atomic<bool> stop_{false};
  std::thread thread_;  // last: it uses all members above
};
using Act = Scripted::Act;

}  // namespace

TEST(bytes_go_over_both_links) {
  Bench bench;
  bench.connect();
  bench.load();
  const RouteState route = bench.route();
  CHECK(route.name == "host" && route.error.empty());
  CHECK(route.bytes > 0 && route.bytes < kGranules * kGranule && route.bandwidth > 0);
  bench.load();
}

TEST(a_background_load_uses_only_the_own_link) {
  Bench bench;
  bench.connect();
  bench.load(kBackground);
  CHECK(bench.route().bytes == 0);
  bench.load();
  CHECK(bench.route().bytes > 0);
}

TEST(a_waiting_thread_moves_both_links_without_loaders) {
  Bench bench(0);
  bench.connect();
  bench.load();
  CHECK(bench.route().bytes > 0);
}

TEST(a_peer_s_call_that_fails_costs_no_bytes) {
  using enum Primitive;
  for (const Primitive call : {copy_to_device, copy_to_peer, event_record, event_query, event_wait})
    for (const Status status : {Status::failed, Status::out_of_memory, Status::device_lost})
      for (const std::uint64_t last : {1ull, ~0ull}) {
        // This device only reports that it is lost; its earlier work continues.
        if (status == Status::device_lost && call != copy_to_device) continue;
        Bench bench;
        bench.connect();
        bench.peer.driver->arm({{1, last}}, call, status);
        bench.load();
        const bool hit = bench.peer.driver->injected() > 0;
        // A copy that is found complete is not waited for; and after a wait that failed at its
        // timeout, the next poll may find the copy complete.
        const bool sure = call != event_wait;
        CHECK(hit || !sure);
        if (sure && (last > 1 || status == Status::device_lost))
          CHECK(!bench.route().error.empty());
        bench.peer.driver->disarm();
        bench.peer_lost = hit && status == Status::device_lost;
        bench.load();
      }
}

TEST(an_error_of_the_own_link_fails_the_load) {
  Bench bench;
  bench.connect();
  bench.load();
  bench.runtime->evict(bench.model, in(kLong), nullptr);
  bench.device.driver->arm({{1, ~0ull}}, Primitive::copy_to_device, Status::failed);
  CHECK_THROWS(general, bench.runtime->wait(bench.runtime->prewarm(bench.model, kForeground),
                                            in(kLong), nullptr));
  bench.device.driver->disarm();
  CHECK(bench.route().error.empty());
  bench.load();
}

TEST(pieces_that_a_route_spoils_are_sent_again) {
  Bench bench;
  bench.runtime->add_route(std::make_shared<Scripted>(
      "spoils", [](int piece) { return piece < 2 ? Act::carry : Act::spoil; }));
  for (int i = 0; i < 3; ++i) bench.load();
  CHECK(bench.route().error == "it was told to");
}

TEST(a_route_that_refuses_is_not_used_again) {
  Bench bench;
  std::atomic<int> asked{0};
  bench.runtime->add_route(std::make_shared<Scripted>("refuses", [&](int) {
    ++asked;
    return Act::refuse;
  }));
  bench.load();
  bench.load();
  CHECK(asked == 1 && bench.route().error == "it was told to refuse");
}

TEST(a_full_route_delays_no_load) {
  Bench bench;
  bench.runtime->add_route(std::make_shared<Scripted>("full", [](int) { return Act::full; }));
  bench.load();
  CHECK(bench.route().bytes == 0 && bench.route().error.empty());
}

TEST(a_layer_arrives_with_its_last_chunk_over_any_link) {
  Bench bench;
  auto route = std::make_shared<Scripted>("slow", [](int) { return Act::carry; });
  Scripted& slow = *route;
  slow.held = true;
  bench.runtime->add_route(std::move(route));
  // The own link stays busy with the first chunk, so the second one takes the route.
  bench.device.gate->shut();
  const LeasePtr lease = bench.runtime->begin_lease({bench.model}, 1);
  bench.runtime->await_lease(lease, in(kLong), nullptr, false);
  const auto stream = std::make_shared<Stream>(bench.runtime->device());
  // The layer's second chunk is on the slow route, so a stream cannot wait for the layer's copies.
  CHECK_THROWS(timeout,
               bench.runtime->await_layer(lease, bench.model, 0, stream, in(10 * kSoon), nullptr));
  CHECK_THROWS(timeout,
               bench.runtime->await_layer(lease, bench.model, 0, nullptr, in(kSoon), nullptr));
  CHECK(!bench.runtime->arrived(lease, bench.model, 0));
  bench.device.gate->open();
  slow.held = false;
  for (std::uint32_t layer = 0; layer < kLayers.size(); ++layer)
    bench.runtime->await_layer(lease, bench.model, layer, stream, in(kLong), nullptr);
  stream->synchronize();
  CHECK(bench.file.is_in(*bench.runtime, bench.model));
  bench.runtime->end_lease(lease);
}

TEST(a_dropped_route_finishes_its_pieces) {
  Bench bench;
  auto route = std::make_shared<Scripted>("leaves", [](int) { return Act::carry; });
  const std::weak_ptr<Scripted> left = route;
  route->held = true;
  bench.runtime->add_route(std::move(route));
  const TicketPtr ticket = bench.runtime->prewarm(bench.model, kForeground);
  CHECK_THROWS(timeout, bench.runtime->wait(ticket, in(10 * kSoon), nullptr));
  bench.runtime->drop_route("leaves");
  CHECK(bench.runtime->state().routes.empty());
  CHECK_THROWS(invalid_argument, bench.runtime->drop_route("leaves"));
  CHECK_THROWS(timeout, bench.runtime->wait(ticket, in(kSoon), nullptr));
  left.lock()->held = false;
  bench.runtime->wait(ticket, in(kLong), nullptr);
  {
    const Leased leased(*bench.runtime, {bench.model});
    CHECK(bench.file.is_in(*bench.runtime, bench.model));
  }
  for (const Deadline end = in(kLong); !left.expired() && Clock::now() < end;)
    std::this_thread::yield();
  CHECK(left.expired());
  bench.connect();  // another route can be added
  bench.load();
}

TEST(an_eviction_waits_for_pieces_on_a_route) {
  Bench bench;
  auto route = std::make_shared<Scripted>("slow", [](int) { return Act::carry; });
  Scripted& slow = *route;
  slow.held = true;
  bench.runtime->add_route(std::move(route));
  const TicketPtr ticket = bench.runtime->prewarm(bench.model, kForeground);
  CHECK_THROWS(timeout, bench.runtime->wait(ticket, in(10 * kSoon), nullptr));
  CHECK_THROWS(timeout, bench.runtime->evict(bench.model, in(10 * kSoon), nullptr));
  slow.held = false;
  bench.runtime->evict(bench.model, in(kLong), nullptr);
  bench.load();
}

TEST(invalid_routes_are_refused) {
  Bench bench;
  bench.connect();
  CHECK_THROWS(invalid_argument, bench.connect());
  CHECK_THROWS(invalid_argument, bench.runtime->drop_route("elsewhere"));
  Watched seen;  // a device whose memory the CPU writes directly
  const auto other = Runtime::make(seen.driver, options(2));
  CHECK_THROWS(invalid_argument,
               other->add_route(make_peer_route(std::make_shared<Device>(bench.peer.driver),
                                                *other->device(), kGranule)));
}

// Routes are added, fail, refuse copies and are removed while threads load and evict.
TEST(routes_can_come_and_go_under_load) {
  Bench bench(3);
  std::atomic<bool> over{false};
  std::jthread changing([&] {
    std::mt19937 random(3);
    for (int round = 0; !over; ++round) {
      const unsigned fate = random() % 4;
      const std::string name = "route " + std::to_string(round);
      bench.runtime->add_route(std::make_shared<Scripted>(name, [fate](int piece) {
        if (piece < 3 || fate == 0) return Act::carry;
        return fate == 1 ? Act::spoil : fate == 2 ? Act::refuse : Act::full;
      }));
      std::this_thread::sleep_for(std::chrono::milliseconds(random() % 8));
      bench.runtime->drop_route(name);
    }
  });
  bench.connect();
  for (int round = 0; round < 60; ++round) {
    if (round % 7 == 3) bench.runtime->cancel(bench.runtime->prewarm(bench.model, kForeground));
    bench.load();
  }
  over = true;
}

}  // namespace warmserve
