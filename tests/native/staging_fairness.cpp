// Staging chunks are lent to the longest waiter, never exceed the limit, and are all returned.
#include <cstring>
#include <mutex>
#include <thread>

#include "fixtures.h"
#include "memory/staging.h"

namespace warmserve {
namespace {

constexpr std::uint64_t kChunk = 64 * kKiB;
constexpr std::size_t kChunks = 3;

struct Bench {
  Watched watched;
  StagingPool pool{std::make_shared<Device>(watched.driver), kChunks * kChunk + 4096, kChunk};
  std::vector<StagingPool::Chunk> take_all() {
    std::vector<StagingPool::Chunk> taken;
    while (auto chunk = pool.try_acquire()) taken.push_back(std::move(*chunk));
    return taken;
  }
};

// A thread that waits in line. Only a waiting thread polls, so its first poll shows that it waits.
class Waiter {
 public:
  Waiter(StagingPool& pool, std::function<void()> served)
      : thread_([this, &pool, served] {
          const StagingPool::Chunk chunk = pool.acquire(in(kLong), [this] { waits_ = true; });
          served();
        }) {
    while (!waits_) std::this_thread::yield();
  }
  ~Waiter() { thread_.join(); }

 private:
  std::atomic<bool> waits_{false};
  std::thread thread_;
};

}  // namespace

TEST(waiters_are_served_in_order_of_arrival) {
  Bench bench;
  auto taken = bench.take_all();
  CHECK(taken.size() == kChunks);
  std::vector<int> order;  // written by the thread that holds the only chunk
  {
    std::vector<std::unique_ptr<Waiter>> line;
    for (int i = 0; i < 6; ++i)
      line.push_back(std::make_unique<Waiter>(bench.pool, [&, i] { order.push_back(i); }));
    taken.pop_back();
  }
  CHECK(order == std::vector{0, 1, 2, 3, 4, 5});
}

TEST(a_new_request_does_not_pass_waiting_ones) {
  Bench bench;
  auto taken = bench.take_all();
  std::atomic<bool> tried{false};
  const Waiter first(bench.pool, [&] {
    taken.pop_back();
    CHECK(!bench.pool.try_acquire());  // the second waiter has the chunk or waits for it
    tried = true;
  });
  const Waiter second(bench.pool, [&] {
    while (!tried) std::this_thread::yield();
  });
  taken.pop_back();
}

TEST(the_pool_never_exceeds_its_limit) {
  Bench bench;
  std::atomic<std::size_t> lent{0};
  std::vector<std::jthread> threads;
  for (unsigned char id = 1; id <= 8; ++id)
    threads.emplace_back([&, id] {
      std::vector<unsigned char> mine(kChunk, id);
      for (int i = 0; i < 300; ++i) {
        const StagingPool::Chunk chunk = bench.pool.acquire(in(kLong), nullptr);
        CHECK(++lent <= kChunks);
        CHECK(bench.pool.pinned_bytes() <= kChunks * kChunk);
        std::memset(chunk.data(), id, kChunk);
        std::this_thread::yield();
        CHECK(std::memcmp(chunk.data(), mine.data(), kChunk) == 0);
        --lent;
      }
    });
  for (std::jthread& thread : threads) thread.join();
  CHECK(bench.pool.available() == kChunks);
  CHECK(bench.watched.strict->live().at("pinned") <= kChunks);
}

TEST(chunks_are_pinned_only_when_needed_and_released_at_the_end) {
  Watched watched;
  {
    StagingPool pool(std::make_shared<Device>(watched.driver), kChunks * kChunk, kChunk);
    CHECK(pool.pinned_bytes() == 0 && pool.available() == kChunks);
    {
      const auto chunk = pool.try_acquire();
    }
    {
      const auto chunk = pool.try_acquire();
    }
    CHECK(pool.pinned_bytes() == kChunk && pool.available() == kChunks);
  }
  watched.expect_returned();
}

TEST(a_wait_that_times_out_leaves_the_line) {
  Bench bench;
  auto taken = bench.take_all();
  CHECK_THROWS(staging_timeout, bench.pool.acquire(in(kSoon), nullptr));
  CHECK_THROWS(staging_timeout, bench.pool.acquire(Clock::now(), nullptr));
  taken.clear();
  CHECK(bench.pool.try_acquire());
  bench.pool.acquire(Clock::now(), nullptr);  // succeeds after the deadline if a chunk is free
}

TEST(a_wait_that_is_interrupted_leaves_the_line) {
  Bench bench;
  auto taken = bench.take_all();
  bool threw = false;
  try {
    bench.pool.acquire(kNever, [] { throw std::runtime_error("interrupted"); });
  } catch (const std::runtime_error&) {
    threw = true;
  }
  CHECK(threw);
  {
    const Waiter waiter(bench.pool, [] {});
    taken.clear();
  }
  CHECK(bench.pool.available() == kChunks);
}

TEST(a_failed_pin_loses_no_chunk) {
  Bench bench;
  bench.watched.driver->arm({{1, 2}}, Primitive::pinned_create, Status::out_of_memory);
  CHECK_THROWS(out_of_device_memory, bench.pool.try_acquire());
  CHECK_THROWS(out_of_device_memory, bench.pool.acquire(in(kLong), nullptr));
  CHECK(bench.pool.available() == kChunks && bench.pool.pinned_bytes() == 0);
  CHECK(bench.take_all().size() == kChunks);
}

// Two threads ask for a chunk while the only chunk is being pinned for a third, whose pin fails.
TEST(a_failed_pin_lets_the_next_waiter_try) {
  Watched watched;
  StagingPool pool(std::make_shared<Device>(watched.driver), kChunk, kChunk);
  watched.driver->arm({{1, 1}}, Primitive::pinned_create, Status::out_of_memory);
  watched.driver->delay(Primitive::pinned_create, std::chrono::milliseconds(50));
  std::atomic<int> failed{0}, served{0};
  std::vector<std::jthread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&] {
      try {
        pool.acquire(in(kLong), nullptr);
        ++served;
      } catch (const Error&) {
        ++failed;
      }
    });
  for (std::jthread& thread : threads) thread.join();
  CHECK(failed == 1 && served == 2);
}

TEST(sizes_that_make_no_chunk_are_refused) {
  const auto device = std::make_shared<Device>(Watched().driver);
  CHECK_THROWS(invalid_argument, StagingPool(device, kChunk - 1, kChunk));
  CHECK_THROWS(invalid_argument, StagingPool(device, kMiB, 0));
  CHECK_THROWS(invalid_argument, StagingPool(device, kMiB, 5000));
}

}  // namespace warmserve
