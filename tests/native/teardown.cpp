// The end of a runtime, of a forked child and of the process, with work in flight.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "fixtures.h"

namespace {

// Number of threads that can still be created; negative: no limit.
int threads_left = -1;

// Turned off in a forked child, which leaks its inherited objects on purpose; many of them are
// referenced only by stacks of threads that it does not have.
bool leaks_are_looked_for = true;
}  // namespace
extern "C" int __lsan_is_turned_off() { return !leaks_are_looked_for; }

// Overrides the C library's function.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*start)(void*), void* argument) {
  if (threads_left == 0) return EAGAIN;
  if (threads_left > 0) --threads_left;
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto real = reinterpret_cast<Create>(::dlsym(RTLD_NEXT, "pthread_create"));
  return real(thread, attributes, start, argument);
}

namespace warmserve {
namespace {

const std::vector<std::uint64_t> kLayers{kGranule, kGranule + 9, 9};

// Runs `body` in a forked child, which then exits normally. Returns whether its exit status was 0.
template <typename Body>
bool child_succeeds(Body body) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    leaks_are_looked_for = false;
    ::alarm(60);
    body();
    std::exit(0);
  }
  int status = 0;
  CHECK(child > 0 && ::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

TEST(a_runtime_that_gets_no_threads_is_refused) {
  for (const int threads : {0, 1, 2}) {
    const Watched device;
    threads_left = threads;
    CHECK_THROWS(general, Runtime::make(device.driver, options(2, 3)));
    threads_left = -1;
    device.expect_returned();
  }
}

TEST(a_runtime_can_be_destroyed_during_a_load) {
  for (const bool host_view : {true, false})
    for (int steps = 0; steps < 12; ++steps) {
      Watched device({.host_view = host_view});
      const ModelFile files[] = {{1, kLayers}, {2, kLayers}};
      auto runtime = Runtime::make(device.driver, options(5));
      TicketPtr tickets[2];
      for (int i = 0; i < 2; ++i)
        tickets[i] = runtime->prewarm(files[i].register_in(*runtime), kBackground);
      std::this_thread::sleep_for(std::chrono::microseconds(300 * steps));
      runtime.reset();
      for (const TicketPtr& ticket : tickets) CHECK(ticket->done);
      device.expect_returned();
    }
}

TEST(a_runtime_can_be_destroyed_between_two_steps) {
  for (const bool host_view : {true, false})
    for (int steps = 0; steps < 45; steps += 3) {
      Watched device({.threads = false, .host_view = host_view});
      const ModelFile files[] = {{1, kLayers}, {2, kLayers}};
      auto runtime = Runtime::make(device.driver, options(5, 0));
      const ModelPtr a = files[0].register_in(*runtime), b = files[1].register_in(*runtime);
      const TicketPtr first = runtime->prewarm(a, kBackground);
      const TicketPtr second = runtime->swap(a, b, kForeground);
      for (int i = 0; i < steps; ++i) runtime->step();
      runtime.reset();
      CHECK(first->done && second->done);
    }
}

// The swap has loaded its model but not yet evicted the other one. Its ticket must end
// nevertheless.
TEST(closing_ends_the_ticket_of_a_swap) {
  Watched device({.threads = false});
  const ModelFile files[] = {{1, kLayers}, {2, kLayers}};
  const auto runtime = Runtime::make(device.driver, options(8, 0));
  const ModelPtr a = files[0].register_in(*runtime), b = files[1].register_in(*runtime);
  {
    const Leased leased(*runtime, {a, b});
  }
  const TicketPtr ticket = runtime->swap(a, b, kForeground);
  runtime->close(nullptr);
  CHECK(runtime->done(ticket));
}

TEST(a_runtime_can_be_destroyed_under_a_lease) {
  Watched device;
  const ModelFile file(1, kLayers);
  auto runtime = Runtime::make(device.driver, options(5));
  ModelPtr model = file.register_in(*runtime);
  LeasePtr lease = runtime->begin_lease({model}, 1);
  runtime->await_lease(lease, in(kLong), nullptr);
  CHECK_THROWS(busy, runtime->close(nullptr));
  runtime.reset();
  lease.reset();
  model.reset();
  device.expect_returned();
}

TEST(two_threads_can_close_a_runtime_at_once) {
  for (int i = 0; i < 20; ++i) {
    Watched device;
    const ModelFile file(1, kLayers);
    auto runtime = Runtime::make(device.driver, options(5));
    runtime->prewarm(file.register_in(*runtime), kBackground);
    std::jthread other([&] { runtime->close(nullptr); });
    runtime->close(nullptr);
    other.join();
    CHECK_THROWS(general, runtime->state());
    runtime.reset();
    device.expect_returned();
  }
}

TEST(close_gives_all_memory_back) {
  for (const bool host_view : {true, false}) {
    Watched device({.host_view = host_view});
    const ModelFile file(1, kLayers);
    const auto runtime = Runtime::make(device.driver, options(5));
    const ModelPtr model = file.register_in(*runtime);
    {
      const Leased leased(*runtime, {model});
    }
    runtime->close(nullptr);
    for (const char* kind : {"granules", "mappings", "pinned"})
      CHECK(device.strict->live().at(kind) == 0);
  }
}

TEST(closing_ends_the_waits_of_other_threads) {
  for (int i = 0; i < 20; ++i) {
    Watched device;
    const ModelFile file(1, kLayers);
    const auto runtime = Runtime::make(device.driver, options(5));
    const ModelPtr model = file.register_in(*runtime);
    device.driver->delay(Primitive::map, std::chrono::milliseconds(i % 5));
    std::vector<std::jthread> threads;
    for (int id = 0; id < 4; ++id)
      threads.emplace_back([&] {
        try {
          const TicketPtr ticket = runtime->prewarm(model, kBackground);
          runtime->wait(ticket, in(kLong), nullptr);
        } catch (const Error& error) {
          if (error.kind() != ErrorKind::cancelled && error.kind() != ErrorKind::general)
            check::fail(__FILE__, __LINE__, std::string("a wait threw: ") + error.what());
        }
      });
    std::this_thread::sleep_for(std::chrono::milliseconds(i % 3));
    runtime->close(nullptr);
    for (std::jthread& thread : threads) thread.join();
  }
}

// Every operation fails at once, even if threads of the parent held a lock at the fork.
TEST(a_forked_child_is_refused_and_its_parent_unharmed) {
  for (const bool host_view : {true, false}) {
    Watched device({.host_view = host_view});
    const ModelFile files[] = {{1, kLayers}, {2, kLayers}};
    auto runtime = Runtime::make(device.driver, options(5));
    const ModelPtr a = files[0].register_in(*runtime), b = files[1].register_in(*runtime);
    auto stream = std::make_shared<Stream>(runtime->device());
    std::atomic<bool> stop{false};
    std::jthread busy([&] {
      std::vector<std::byte> bytes(kGranule);
      while (!stop) {
        for (const auto& [model, file] : {std::pair(&a, &files[0]), std::pair(&b, &files[1])}) {
          const Leased leased(*runtime, {*model});
          CHECK(file->is_in(*runtime, *model));
          stream->copy_from_device(bytes.data(), runtime->reservation(*model)->address(), kGranule);
          runtime->record(leased.lease(), stream);
        }
        runtime->state();
      }
      stream->synchronize();
    });
    std::this_thread::sleep_for(kSoon);
    for (int i = 0; i < (check::thorough() ? 10 : 3); ++i) {
      LeasePtr lease = runtime->begin_lease({a}, 2);
      runtime->await_lease(lease, in(kLong), nullptr);
      const TicketPtr ticket = runtime->prewarm(a, kBackground);
      const bool refused = child_succeeds([&] {
        std::byte bytes[8];
        std::vector<File> none;
        CHECK_THROWS(general, runtime->register_model("new", std::move(none), {}, false));
        CHECK_THROWS(general, runtime->unregister(a, kNever, nullptr));
        CHECK_THROWS(general, runtime->prewarm(a, kBackground));
        CHECK_THROWS(general, runtime->swap(a, b, kBackground));
        CHECK_THROWS(general, runtime->evict(a, kNever, nullptr));
        CHECK_THROWS(general, runtime->trim());
        CHECK_THROWS(general, runtime->set_keep_value(a, 1));
        CHECK_THROWS(general, runtime->begin_lease({a}, 1));
        CHECK_THROWS(general, runtime->begin_lease({}, 1));
        CHECK_THROWS(general, runtime->record(lease, stream));
        CHECK_THROWS(general, runtime->done(ticket));
        CHECK_THROWS(general, runtime->progress(ticket));
        CHECK_THROWS(general, runtime->fileno(ticket));
        CHECK_THROWS(general, runtime->wait(ticket, kNever, nullptr));
        CHECK_THROWS(general, runtime->cancel(ticket));
        CHECK_THROWS(general, runtime->leased(a));
        CHECK_THROWS(general, runtime->reservation(a));
        CHECK_THROWS(general, runtime->read_back(a, 0, bytes));
        CHECK_THROWS(general, runtime->state());
        CHECK_THROWS(general, runtime->check_invariants());
        CHECK_THROWS(general, runtime->close(nullptr));
        CHECK_THROWS(general, stream->synchronize());
        CHECK_THROWS(general, stream->copy_from_device(bytes, 0, 8));
        CHECK_THROWS(general, Stream(runtime->device()));
        runtime->end_lease(lease);  // called by destructors
        lease.reset();
        stream.reset();
        runtime.reset();
      });
      CHECK(refused);
      runtime->end_lease(lease);
    }
    stop = true;
    busy.join();
    runtime->check_invariants();
    runtime->close(nullptr);
    device.expect_kept();
  }
}

TEST(a_forked_child_may_have_a_runtime_of_its_own) {
  if (check::simulator()) return;  // a child cannot use CUDA that was initialised in its parent
  const Watched device;
  const ModelFile file(1, kLayers);
  const auto runtime = Runtime::make(device.driver, options(5, 0));
  const ModelPtr model = file.register_in(*runtime);
  CHECK(child_succeeds([&] {
    const Watched own;
    const auto mine = Runtime::make(own.driver, options(5));
    const ModelPtr again = file.register_in(*mine);
    const Leased leased(*mine, {again});
    CHECK(file.is_in(*mine, again));
  }));
  const Leased leased(*runtime, {model});
  CHECK(file.is_in(*runtime, model));
}

// Static objects are destroyed while loaders and streams are working.
TEST(a_process_can_exit_with_a_live_runtime) {
  if (check::simulator()) return;  // as above
  for (const bool announced : {true, false})
    CHECK(child_succeeds([&] {
      static std::shared_ptr<Runtime> runtime =
          Runtime::make(make_device({.host_view = false}), options(5));
      static const ModelFile file(1, kLayers);
      static const ModelPtr model = file.register_in(*runtime);
      static const TicketPtr ticket = runtime->prewarm(model, kBackground);
      if (announced) Device::process_exits();
    }));
}

}  // namespace warmserve
