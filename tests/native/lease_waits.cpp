// Waiting leases are admitted in order or get an error that says why, and an interrupted wait
// leaves no lease behind.
#include <thread>

#include "fixtures.h"

namespace warmserve {
namespace {

struct Interrupted {};
const Poll interrupt = [] { throw Interrupted{}; };

// Returns whether the first poll of the wait interrupts it.
template <typename Wait>
bool interrupted(Wait wait) {
  try {
    wait();
  } catch (const Interrupted&) {
    return true;
  }
  return false;
}

// An arena of four granules, and models of two granules each.
struct Bench {
  explicit Bench(const HostOptions& host = {}, unsigned loaders = 1)
      : device(host), runtime(Runtime::make(device.driver, options(4, loaders))) {
    for (auto& file : files) models.push_back(file.register_in(*runtime));
  }
  ~Bench() {
    if (open) {
      runtime->check_invariants();
      CHECK(runtime->state().leases == 0);
      for (const ModelPtr& model : models) runtime->evict(model, in(kLong), nullptr);
      runtime->check_invariants();
    }
    runtime.reset();
    models.clear();
    device.expect_returned();
  }
  // Returns whether the lease has its layers now. Waits kSoon at most, because the loader needs a
  // moment.
  bool holds(const LeasePtr& lease) {
    try {
      if (lease->entry) runtime->wait(lease->entry, in(kSoon), nullptr);
      if (lease->ticket) runtime->wait(lease->ticket, in(kSoon), nullptr);
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::timeout);
      return false;
    }
    return true;
  }
  void arrive(const LeasePtr& lease) { runtime->await_lease(lease, in(kLong), nullptr); }

  Watched device;
  std::shared_ptr<Runtime> runtime;
  ModelFile files[4] = {{1, {kGranule, 9}}, {2, {kGranule, 9}}, {3, {kGranule, 9}}, {4, {9}}};
  std::vector<ModelPtr> models;
  bool open = true;
};

}  // namespace

TEST(leases_are_given_in_order_of_arrival) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const auto& m = bench.models;
  const LeasePtr all = runtime.begin_lease({m[0], m[1]}, 1);
  bench.arrive(all);
  const LeasePtr pair = runtime.begin_lease({m[1], m[2]}, 2);
  const LeasePtr small = runtime.begin_lease({m[3]}, 3);
  CHECK(!bench.holds(pair) && !bench.holds(small));
  runtime.end_lease(all);
  bench.arrive(pair);
  CHECK(!bench.holds(small));
  runtime.end_lease(pair);
  bench.arrive(small);
  runtime.end_lease(small);
}

TEST(only_an_owner_that_holds_every_model_passes_the_line) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const auto& m = bench.models;
  const LeasePtr one = runtime.begin_lease({m[0]}, 1);
  bench.arrive(one);
  const LeasePtr head = runtime.begin_lease({m[1], m[2]}, 2);
  const LeasePtr would_fit = runtime.begin_lease({m[3]}, 3);
  CHECK(!bench.holds(would_fit));
  const LeasePtr nested = runtime.begin_lease({m[0]}, 1);
  bench.arrive(nested);
  const LeasePtr of_another = runtime.begin_lease({m[0]}, 4);
  CHECK(!bench.holds(of_another));
  for (const LeasePtr& lease : {nested, one}) runtime.end_lease(lease);
  bench.arrive(head);
  for (const LeasePtr& lease : {head, would_fit, of_another}) runtime.end_lease(lease);
}

TEST(a_wait_that_times_out_leaves_the_line) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const auto& m = bench.models;
  const Leased held(runtime, {m[0]});
  const LeasePtr head = runtime.begin_lease({m[1], m[2]}, 2);
  const LeasePtr next = runtime.begin_lease({m[3]}, 3);
  CHECK_THROWS(timeout, runtime.await_lease(head, in(kSoon), nullptr));
  bench.arrive(next);
  CHECK(bench.files[3].is_in(runtime, m[3]));
  CHECK(!head->admitted && runtime.state().leases == 2);
  runtime.end_lease(head);  // a second time, without effect
  runtime.end_lease(next);
}

TEST(a_lease_given_up_in_line_lets_the_next_one_in) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const auto& m = bench.models;
  const Leased held(runtime, {m[0]});
  const LeasePtr head = runtime.begin_lease({m[1], m[2]}, 2);
  const LeasePtr next = runtime.begin_lease({m[3]}, 3);
  runtime.end_lease(head);
  bench.arrive(next);
  runtime.end_lease(next);
}

TEST(leases_that_would_wait_for_each_other_are_refused) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const auto& m = bench.models;
  const LeasePtr first = runtime.begin_lease({m[0]}, 1), second = runtime.begin_lease({m[1]}, 2);
  bench.arrive(first);
  bench.arrive(second);
  const LeasePtr waits = runtime.begin_lease({m[2]}, 1);
  CHECK_THROWS(busy, runtime.begin_lease({m[2], m[3]}, 2));
  CHECK(!bench.holds(waits));
  runtime.end_lease(second);
  bench.arrive(waits);
  for (const LeasePtr& lease : {first, waits}) runtime.end_lease(lease);
}

TEST(a_lease_that_can_never_fit_is_refused_at_once) {
  Bench bench;
  CHECK_THROWS(out_of_device_memory,
               bench.runtime->begin_lease({bench.models[0], bench.models[1], bench.models[2]}, 1));
}

TEST(a_lease_in_line_for_a_model_that_is_unregistered_ends) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const auto& m = bench.models;
  const LeasePtr held = runtime.begin_lease({m[0], m[1]}, 1);
  bench.arrive(held);
  const LeasePtr waits = runtime.begin_lease({m[2]}, 2);
  const LeasePtr behind = runtime.begin_lease({m[3]}, 3);
  runtime.unregister(m[2], in(kLong), nullptr);
  runtime.end_lease(held);
  CHECK_THROWS(cancelled, bench.arrive(waits));
  bench.arrive(behind);
  runtime.end_lease(behind);
  bench.models[2] = bench.files[2].register_in(runtime);
  const Leased again(runtime, {bench.models[2]});
  CHECK(bench.files[2].is_in(runtime, bench.models[2]));
}

TEST(an_interrupt_ends_a_wait_in_line) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const auto& m = bench.models;
  const LeasePtr held = runtime.begin_lease({m[0], m[1]}, 1);
  bench.arrive(held);
  const LeasePtr waits = runtime.begin_lease({m[2]}, 2);
  CHECK(interrupted([&] { runtime.await_lease(waits, kNever, interrupt); }));
  runtime.end_lease(held);
  const Leased again(runtime, {m[2]}, 2);
  CHECK(bench.files[2].is_in(runtime, m[2]));
}

TEST(an_interrupt_ends_a_wait_for_a_load) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const ModelPtr& model = bench.models[0];
  bench.device.driver->delay(Primitive::map, std::chrono::milliseconds(300));
  const LeasePtr lease = runtime.begin_lease({model}, 1);
  CHECK(interrupted([&] { runtime.await_lease(lease, kNever, interrupt); }));
  const TicketPtr ticket = runtime.prewarm(model, kBackground);
  CHECK(interrupted([&] { runtime.wait(ticket, kNever, interrupt); }));
  runtime.wait(ticket, in(kLong), nullptr);  // an interrupted wait does not cancel the load
  const Leased again(runtime, {model});
  CHECK(bench.files[0].is_in(runtime, model));
}

// An eviction has to wait for a stream that has not passed its fence.
TEST(an_interrupt_or_a_timeout_ends_a_wait_for_a_stream) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const ModelPtr model = bench.models[0];
  const auto stream = std::make_shared<Stream>(runtime.device());
  std::vector<std::byte> copied(kGranule);
  {
    const Leased leased(runtime, {model});
    bench.device.gate->shut();
    stream->copy_from_device(copied.data(), runtime.reservation(model)->address(), kGranule);
    runtime.record(leased.lease(), stream);
  }
  CHECK_THROWS(timeout, runtime.evict(model, in(kSoon), nullptr));
  CHECK(interrupted([&] { runtime.evict(model, kNever, interrupt); }));
  CHECK(interrupted([&] { runtime.unregister(model, kNever, interrupt); }));
  runtime.check_invariants();
  CHECK(!runtime.leased(model).second);
  {
    const Leased again(runtime, {model});  // the layers are still resident
    CHECK(bench.files[0].is_in(runtime, model));
  }
  CHECK(runtime.state().counters.layers_loaded == 2);
  bench.device.gate->open();
  runtime.evict(model, in(kLong), nullptr);
  stream->synchronize();
  CHECK(bench.files[0].equals(0, copied.data()));
}

TEST(an_interrupt_ends_a_wait_of_close) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const auto stream = std::make_shared<Stream>(runtime.device());
  {
    const Leased leased(runtime, {bench.models[0]});
    bench.device.gate->shut();
    runtime.record(leased.lease(), stream);
  }
  CHECK(interrupted([&] { runtime.close(interrupt); }));
  CHECK_THROWS(general, runtime.prewarm(bench.models[1], kBackground));
  bench.device.gate->open();
  runtime.close(nullptr);
  bench.open = false;
}

// A load that has to evict layers waits for their fences. If it is cancelled during that wait, a
// ticket that joins it at that time must not fail.
TEST(a_ticket_that_joins_a_cancelled_load_does_not_fail) {
  Bench bench;
  Runtime& runtime = *bench.runtime;
  const auto& m = bench.models;
  const auto stream = std::make_shared<Stream>(runtime.device());
  {
    const Leased leased(runtime, {m[0], m[1]});
    bench.device.gate->shut();
    runtime.record(leased.lease(), stream);
  }
  const TicketPtr first = runtime.prewarm(m[2], kBackground);
  std::this_thread::sleep_for(kSoon);  // the load now waits for the fence
  runtime.cancel(first);
  const TicketPtr second = runtime.prewarm(m[2], kBackground);
  std::this_thread::sleep_for(2 * kSoon);
  bench.device.gate->open();
  CHECK_THROWS(cancelled, runtime.wait(first, in(kLong), nullptr));
  runtime.wait(second, in(kLong), nullptr);
  const Leased leased(runtime, {m[2]});
  CHECK(bench.files[2].is_in(runtime, m[2]));
}

}  // namespace warmserve
