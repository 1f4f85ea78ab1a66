// The host driver's streams keep the order that events define, with and without threads.
#include <algorithm>
#include <cstring>
#include <thread>

#include "driver/host/copies.h"
#include "fixtures.h"

namespace warmserve {
namespace {

using std::chrono::microseconds;
constexpr microseconds kForLong = std::chrono::seconds(60);

// A device with a writable granule, and streams that copy to words of the granule.
struct Bench {
  explicit Bench(bool threads) : driver(make_host_driver({.threads = threads})) {
    CHECK(driver->granule_create(kBig, &granule) == Status::ok);
    CHECK(driver->address_reserve(kBig, &address) == Status::ok);
    CHECK(driver->map(address, &granule, 1) == Status::ok);
    CHECK(driver->set_access(address, kBig, Access::read_write) == Status::ok);
  }
  ~Bench() {
    CHECK(driver->unmap(address, kBig) == Status::ok);
    CHECK(driver->address_free(address, kBig) == Status::ok);
    CHECK(driver->granule_release(granule) == Status::ok);
  }
  StreamId stream() {
    StreamId id{};
    CHECK(driver->stream_create(StreamPriority::normal, &id) == Status::ok);
    return id;
  }
  EventId event() {
    EventId id{};
    CHECK(driver->event_create(&id) == Status::ok);
    return id;
  }
  // Enqueues a copy of word `from` to word `to`.
  void move(StreamId stream, std::size_t to, std::size_t from) {
    CHECK(driver->copy_to_device(address + 8 * to, bytes(from), 8, stream) == Status::ok);
  }
  // Enqueues a long operation: a copy of all words from kToiled on to the beginning.
  void toil(StreamId stream) {
    CHECK(driver->copy_to_device(address, bytes(kToiled), kBig / 2, stream) == Status::ok);
  }
  std::byte* bytes(std::size_t word) { return reinterpret_cast<std::byte*>(address) + 8 * word; }
  std::uint64_t& word(std::size_t i) { return *reinterpret_cast<std::uint64_t*>(bytes(i)); }
  bool steps(StreamId stream) { return driver->stream_step(stream) == Status::ok; }

  static constexpr std::uint64_t kBig = 64 * kMiB;
  static constexpr std::size_t kToiled = kBig / 2 / 8;
  std::shared_ptr<Driver> driver;
  Handle granule{};
  Address address = 0;
};

// Each stream waits for the stream before it, and the first one has the longest operation.
void chain_of_waits(bool threads) {
  Bench bench(threads);
  bench.word(Bench::kToiled) = 42;
  std::vector<StreamId> streams;
  std::vector<EventId> events;
  for (std::size_t i = 0; i < 6; ++i) {
    streams.push_back(bench.stream());
    events.push_back(bench.event());
    if (i == 0)
      bench.toil(streams[i]);
    else
      CHECK(bench.driver->stream_wait_event(streams[i], events[i - 1]) == Status::ok);
    bench.move(streams[i], i + 1, i);
    CHECK(bench.driver->event_record(events[i], streams[i]) == Status::ok);
  }
  CHECK(bench.driver->event_wait(events.back(), kForLong) == Status::ok);
  for (std::size_t i = 0; i < 7; ++i) CHECK(bench.word(i) == 42);
  for (const EventId event : events) CHECK(bench.driver->event_query(event) == Status::ok);
  for (const StreamId stream : streams) CHECK(bench.driver->stream_destroy(stream) == Status::ok);
}

}  // namespace

TEST(streams_wait_for_each_other_with_threads) { chain_of_waits(true); }
TEST(streams_wait_for_each_other_without_threads) { chain_of_waits(false); }

TEST(an_event_never_recorded_is_complete) {
  for (const bool threads : {true, false}) {
    Bench bench(threads);
    const EventId event = bench.event();
    const StreamId stream = bench.stream();
    CHECK(bench.driver->event_query(event) == Status::ok);
    CHECK(bench.driver->event_wait(event, microseconds(0)) == Status::ok);
    CHECK(bench.driver->stream_wait_event(stream, event) == Status::ok);
    CHECK(bench.driver->stream_synchronize(stream) == Status::ok);
  }
}

TEST(a_wait_keeps_the_position_it_began_with) {
  Bench bench(false);
  const StreamId a = bench.stream(), b = bench.stream();
  const EventId event = bench.event();
  bench.word(0) = 1;
  bench.move(a, 1, 0);
  CHECK(bench.driver->event_record(event, a) == Status::ok);
  CHECK(bench.driver->stream_wait_event(b, event) == Status::ok);
  bench.move(b, 2, 1);
  bench.move(a, 3, 0);
  CHECK(bench.driver->event_record(event, a) == Status::ok);  // a second time, at a later position
  CHECK(!bench.steps(b));
  CHECK(bench.steps(a) && bench.steps(a));  // the first copy and the first record
  CHECK(bench.driver->event_query(event) == Status::not_ready);
  CHECK(bench.steps(b) && bench.steps(b) && bench.word(2) == 1);
  CHECK(bench.word(3) == 0);
  CHECK(bench.driver->event_wait(event, microseconds(0)) == Status::ok && bench.word(3) == 1);
}

TEST(an_event_destroyed_while_pending_still_orders_its_waiters) {
  for (const bool threads : {true, false}) {
    Bench bench(threads);
    const StreamId a = bench.stream(), b = bench.stream();
    const EventId event = bench.event();
    bench.word(Bench::kToiled) = 7;
    bench.toil(a);
    CHECK(bench.driver->event_record(event, a) == Status::ok);
    CHECK(bench.driver->stream_wait_event(b, event) == Status::ok);
    CHECK(bench.driver->event_destroy(event) == Status::ok);
    CHECK(bench.driver->event_query(event) == Status::invalid);
    bench.move(b, Bench::kToiled + 1, 0);
    CHECK(bench.driver->stream_synchronize(b) == Status::ok);
    CHECK(bench.word(Bench::kToiled + 1) == 7);
  }
}

TEST(a_wait_without_threads_runs_only_what_it_needs) {
  Bench bench(false);
  const StreamId a = bench.stream(), b = bench.stream(), idle = bench.stream();
  const EventId first = bench.event(), second = bench.event();
  bench.word(0) = 5;
  bench.move(idle, 9, 0);
  bench.move(a, 1, 0);
  CHECK(bench.driver->event_record(first, a) == Status::ok);
  bench.move(a, 8, 0);
  CHECK(bench.driver->stream_wait_event(b, first) == Status::ok);
  bench.move(b, 2, 1);
  CHECK(bench.driver->event_record(second, b) == Status::ok);
  CHECK(bench.driver->event_wait(second, microseconds(0)) == Status::ok);
  CHECK(bench.word(2) == 5 && bench.word(8) == 0 && bench.word(9) == 0);
}

TEST(a_stream_with_work_is_not_destroyed) {
  Bench bench(false);
  const StreamId stream = bench.stream();
  bench.word(0) = 3;
  bench.move(stream, 1, 0);
  CHECK(bench.driver->stream_destroy(stream) == Status::not_ready);
  CHECK(bench.driver->stream_synchronize(stream) == Status::ok && bench.word(1) == 3);
  CHECK(bench.driver->stream_destroy(stream) == Status::ok);
  CHECK(bench.driver->stream_destroy(stream) == Status::invalid);
  CHECK(bench.driver->stream_synchronize(stream) == Status::invalid);
}

TEST(a_timed_wait_ends_when_its_time_has_passed) {
  Bench bench(true);
  const StreamId stream = bench.stream();
  const EventId event = bench.event();
  for (int i = 0; i < 20; ++i) bench.toil(stream);
  CHECK(bench.driver->event_record(event, stream) == Status::ok);
  CHECK(bench.driver->event_wait(event, microseconds(100)) == Status::not_ready);
  CHECK(bench.driver->event_wait(event, kForLong) == Status::ok);
}

// A thread that synchronizes a stream also waits for a step that another thread is running.
TEST(two_threads_can_step_one_stream) {
  Bench bench(false);
  const StreamId stream = bench.stream();
  const EventId event = bench.event();
  const std::size_t last = Bench::kToiled - 1;
  for (std::uint64_t i = 1; i <= 20; ++i) {
    bench.word(Bench::kToiled) = bench.word(Bench::kToiled + last) = i;
    bench.toil(stream);
    CHECK(bench.driver->event_record(event, stream) == Status::ok);
    std::atomic<bool> started{false};
    std::jthread other([&] {
      started = true;
      while (bench.steps(stream)) {
      }
    });
    while (!started) std::this_thread::yield();
    std::this_thread::sleep_for(microseconds(1000 * (i % 4)));
    if (i % 2)
      CHECK(bench.driver->stream_synchronize(stream) == Status::ok);
    else
      while (bench.driver->event_wait(event, kForLong) != Status::ok) {
      }
    CHECK(bench.word(0) == i && bench.word(last) == i);
    other.join();
  }
}

TEST(many_threads_can_share_streams) {
  Bench bench(true);
  const StreamId streams[] = {bench.stream(), bench.stream()};
  std::vector<std::jthread> threads;
  for (std::size_t id = 0; id < 8; ++id)
    threads.emplace_back([&, id] {
      const EventId event = bench.event();
      std::uint64_t from = 0, to = 0;
      for (std::uint64_t i = 1; i <= 500; ++i) {
        const StreamId stream = streams[i % 2], then = streams[(i + id) % 2];
        from = i << 8 | id;
        const Address slot = bench.address + kMiB * (id + 1);
        CHECK(bench.driver->copy_to_device(slot, reinterpret_cast<std::byte*>(&from), 8, stream) ==
              Status::ok);
        CHECK(bench.driver->event_record(event, stream) == Status::ok);
        CHECK(bench.driver->stream_wait_event(then, event) == Status::ok);
        CHECK(bench.driver->copy_from_device(reinterpret_cast<std::byte*>(&to), slot, 8, then) ==
              Status::ok);
        CHECK(bench.driver->event_record(event, then) == Status::ok);
        CHECK(bench.driver->event_wait(event, kForLong) == Status::ok);
        CHECK(to == from);
      }
      CHECK(bench.driver->event_destroy(event) == Status::ok);
    });
  for (std::jthread& thread : threads) thread.join();
  for (const StreamId stream : streams) {
    CHECK(bench.driver->stream_synchronize(stream) == Status::ok);
    CHECK(bench.driver->stream_destroy(stream) == Status::ok);
  }
}

// Even if the user did not wait for the work, the driver's destructor must not access freed memory.
TEST(a_driver_can_be_destroyed_with_work_in_flight) {
  for (const bool threads : {true, false}) {
    std::vector<std::byte> from(16 * kMiB), to(16 * kMiB);
    auto driver = make_host_driver({.threads = threads});
    StreamId a{}, b{};
    EventId event{};
    CHECK(driver->stream_create(StreamPriority::normal, &a) == Status::ok &&
          driver->stream_create(StreamPriority::normal, &b) == Status::ok);
    CHECK(driver->event_create(&event) == Status::ok);
    for (int i = 0; i < 4; ++i) {
      const auto address = reinterpret_cast<Address>(to.data());
      CHECK(driver->copy_to_device(address, from.data(), from.size(), a) == Status::ok);
      CHECK(driver->event_record(event, a) == Status::ok);
      CHECK(driver->stream_wait_event(b, event) == Status::ok);
    }
    driver.reset();
  }
}

// Long copies bypass the processor's caches in whole lines; the rest of a copy does not.
TEST(a_copy_of_any_length_and_alignment_writes_its_bytes_only) {
  constexpr std::uint64_t kMost = kMiB + 4096;
  std::vector<std::byte> from(kMost + 64), to(kMost + 192);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::byte>(i * 131 + i / 251);
  for (const std::uint64_t bytes : {1ul, 63ul, 256 * kKiB, 256 * kKiB + 1, 256 * kKiB + 127, kMost})
    for (const std::uint64_t skip : {0, 1, 63})
      for (const std::uint64_t begin : {64, 65, 100, 127}) {
        std::fill(to.begin(), to.end(), std::byte{0xee});
        copy_past_caches(to.data() + begin, from.data() + skip, bytes);
        CHECK(std::memcmp(to.data() + begin, from.data() + skip, bytes) == 0);
        const auto untouched = [](std::byte each) { return each == std::byte{0xee}; };
        CHECK(std::all_of(to.begin(), to.begin() + static_cast<long>(begin), untouched));
        CHECK(std::all_of(to.begin() + static_cast<long>(begin + bytes), to.end(), untouched));
      }
}

}  // namespace warmserve
