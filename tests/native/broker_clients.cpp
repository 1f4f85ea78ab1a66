// Clients of a broker, in threads of one process: their leases have the right bytes while layers
// are revoked, and all granules are free in the end.
#include <sys/stat.h>
#include <unistd.h>

#include <random>
#include <thread>

#include "broker/server.h"
#include "fixtures.h"

namespace warmserve {
namespace {

// Four granules per model.
const std::vector<std::uint64_t> kLayers{kGranule, kGranule + 700'001, 300'000};
constexpr std::size_t kModels = 3;

struct Folder {
  Folder() { CHECK(::mkdtemp(path.data()) != nullptr); }
  ~Folder() {
    ::unlink((path + "/s.lock").c_str());
    ::rmdir(path.c_str());
  }
  std::string path = "/tmp/warmserve-broker-XXXXXX";
};

// A broker with an arena of `granules` granules, and the files of its clients' models.
struct Served {
  explicit Served(std::uint32_t granules, std::chrono::milliseconds patience = kLong,
                  std::shared_ptr<Folder> at = std::make_shared<Folder>())
      : folder(std::move(at)), runtime(Runtime::make(device.driver, options(granules))) {
    server = BrokerServer::make(
        *runtime, {.path = folder->path + "/s", .version = "1", .patience = patience});
    for (std::uint64_t id = 1; id <= kModels; ++id)
      files.push_back(std::make_unique<ModelFile>(id, kLayers));
  }
  ~Served() { server->stop(); }

  // All granules can be used again once no client maps layers.
  void expect_idle() {
    for (const ModelState& model : runtime->state().models) CHECK(model.leases == 0);
    runtime->check_invariants();
    server->stop();
    runtime->close(nullptr);
    device.expect_kept();
  }

  std::shared_ptr<Folder> folder;
  Watched device;
  std::shared_ptr<Runtime> runtime;
  std::shared_ptr<BrokerServer> server;
  std::vector<std::unique_ptr<ModelFile>> files;
};

struct Client {
  explicit Client(Served& served, unsigned loaders = 1, std::chrono::milliseconds patience = {})
      : files(served.files) {
    RuntimeOptions wanted = options(1, loaders);
    wanted.broker = std::make_shared<BrokerConnection>(served.folder->path + "/s", "1", "test",
                                                       in(kLong), nullptr);
    wanted.broker->patience = patience;
    wanted.arena_bytes = wanted.broker->granules * kGranule;
    runtime = Runtime::make(device.driver, wanted);
    for (const auto& file : files) models.push_back(file->register_in(*runtime));
  }
  void close() {
    runtime->check_invariants();
    runtime->close(nullptr);
    runtime.reset();
    models.clear();
    device.expect_returned();
  }

  Watched device;
  std::shared_ptr<Runtime> runtime;
  std::vector<std::unique_ptr<ModelFile>>& files;
  std::vector<ModelPtr> models;
};

bool is_mapped(const Client& client, std::size_t model) {
  return client.models[model]->missing == 0;
}

}  // namespace

TEST(a_client_maps_what_another_has_loaded) {
  Served served(9);
  Client a(served), b(served);
  const Leased leased(*a.runtime, {a.models[0]});
  CHECK(a.files[0]->is_in(*a.runtime, a.models[0]));
  const std::uint64_t loaded = served.runtime->state().counters.bytes_loaded;
  const Leased again(*b.runtime, {b.models[0]});
  CHECK(b.files[0]->is_in(*b.runtime, b.models[0]));
  CHECK(served.runtime->state().counters.bytes_loaded == loaded);
}

TEST(clients_swap_in_place_of_each_other) {
  Served served(5);
  Client a(served), b(served);
  for (int turn = 0; turn < 6; ++turn) {
    Client& client = turn % 2 ? b : a;
    const std::size_t model = turn % kModels;
    const Leased leased(*client.runtime, {client.models[model]});
    CHECK(client.files[model]->is_in(*client.runtime, client.models[model]));
  }
  a.close();
  b.close();
  served.expect_idle();
}

TEST(a_leased_layer_is_unmapped_when_its_last_lease_ends) {
  Served served(5);
  Client a(served), b(served);
  LeasePtr waiting;
  {
    const Leased leased(*a.runtime, {a.models[0]});
    waiting = b.runtime->begin_lease({b.models[1]}, 2);
    CHECK_THROWS(timeout, b.runtime->await_lease(b.runtime->begin_lease({b.models[2]}, 3),
                                                 in(kSoon), nullptr));
    CHECK(a.files[0]->is_in(*a.runtime, a.models[0]));
  }
  b.runtime->await_lease(waiting, in(kLong), nullptr);
  CHECK(b.files[1]->is_in(*b.runtime, b.models[1]));
  CHECK(!is_mapped(a, 0));
  b.runtime->end_lease(waiting);
  a.close();
  b.close();
  served.expect_idle();
}

TEST(an_eviction_by_one_client_waits_for_the_leases_of_another) {
  Served served(9);
  Client a(served), b(served);
  {
    const Leased leased(*a.runtime, {a.models[0]});
    CHECK_THROWS(busy, b.runtime->evict(b.models[0], in(kLong), nullptr, WaitFor::none));
    CHECK_THROWS(timeout,
                 b.runtime->evict(b.models[0], in(kSoon), nullptr, WaitFor::leases_and_streams));
    CHECK(a.files[0]->is_in(*a.runtime, a.models[0]));
  }
  b.runtime->evict(b.models[0], in(kLong), nullptr, WaitFor::leases_and_streams);
  CHECK(served.runtime->state().granules_free == 9);
}

// A client without threads answers only in step(), like a process that is stopped.
TEST(a_client_that_does_not_answer_keeps_its_layers) {
  Served served(9, kSoon);
  Client stopped(served, 0), other(served);
  stopped.runtime->wait(stopped.runtime->prewarm(stopped.models[0], kForeground), in(kLong),
                        nullptr);
  stopped.runtime->wait(stopped.runtime->prewarm(stopped.models[1], kForeground), in(kLong),
                        nullptr);
  const LeasePtr lease = other.runtime->begin_lease({other.models[2]}, 2);
  CHECK_THROWS(timeout, other.runtime->await_lease(lease, in(5 * kSoon), nullptr));
  CHECK(stopped.files[0]->is_in(*stopped.runtime, stopped.models[0]));
  const LeasePtr patient = other.runtime->begin_lease({other.models[2]}, 2);
  while (!other.runtime->ready(patient, true)) stopped.runtime->step();
  CHECK(other.files[2]->is_in(*other.runtime, other.models[2]));
  other.runtime->end_lease(patient);
  stopped.close();
  other.close();
  served.expect_idle();
}

// Each client holds a layer that the other's lease needs the room of. The queue sees both.
TEST(clients_that_would_wait_for_each_other_are_told) {
  Served served(4);
  Client a(served), b(served);
  const auto first = [](const Client& client, std::size_t model) {
    LayerSet layers;
    layers.insert(1);  // of two granules
    return Selection(client.models[model], layers);
  };
  const Leased one(*a.runtime, {first(a, 0)}, 1), two(*b.runtime, {first(b, 1)}, 2);
  const LeasePtr waiting = a.runtime->begin_lease({first(a, 1)}, 1);
  a.runtime->await_lease(waiting, in(kLong), nullptr);  // b has brought it
  std::atomic<int> refused = 0;
  const auto want_third = [&](Client& client, std::uint64_t owner) {
    try {
      const LeasePtr lease = client.runtime->begin_lease({first(client, 2)}, owner);
      client.runtime->await_lease(lease, in(std::chrono::seconds(2)), nullptr);
      client.runtime->end_lease(lease);
    } catch (const Error& error) {
      refused += error.kind() == ErrorKind::busy;
    }
  };
  {
    const std::jthread other([&] { want_third(b, 2); });
    want_third(a, 1);
  }
  CHECK(refused >= 1);
  a.runtime->end_lease(waiting);
}

TEST(mapped_layers_outlive_the_broker) {
  auto served = std::make_unique<Served>(9);
  Client client(*served);
  const Leased leased(*client.runtime, {client.models[0]});
  served->server->stop();
  CHECK_THROWS(general, client.runtime->wait(client.runtime->prewarm(client.models[1], kForeground),
                                             in(kLong), nullptr));
  served->runtime->check_invariants();
  CHECK(client.files[0]->is_in(*client.runtime, client.models[0]));
}

TEST(a_client_goes_on_with_another_broker) {
  Served first(9);
  Client client(first, 1, kLong);
  LeasePtr waiting;
  {
    const Leased leased(*client.runtime, {client.models[0]});
    first.server->stop();
    waiting = client.runtime->begin_lease({client.models[1]}, 2);
    CHECK_THROWS(timeout,
                 client.runtime->await_lease(client.runtime->begin_lease({client.models[2]}, 3),
                                             in(kSoon), nullptr));
    Served second(9, kLong, first.folder);
    client.runtime->await_lease(waiting, in(kLong), nullptr);
    CHECK(client.files[1]->is_in(*client.runtime, client.models[1]));
    // Its memory is still that of the first broker.
    CHECK(client.files[0]->is_in(*client.runtime, client.models[0]));
    client.runtime->end_lease(waiting);
    waiting = client.runtime->begin_lease({client.models[0]}, 2);
    second.server->stop();
  }
  client.runtime->end_lease(waiting);
}

// Threads of several clients lease more than fits; some leases time out, some loads are cancelled.
TEST(clients_can_mix_operations) {
  Served served(9);
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 3; ++i) clients.push_back(std::make_unique<Client>(served));
  std::vector<std::jthread> threads;
  for (std::uint64_t id = 0; id < 6; ++id)
    threads.emplace_back([&, id] {
      Client& client = *clients[id % clients.size()];
      Runtime& runtime = *client.runtime;
      std::minstd_rand random(static_cast<unsigned>(id + 1));
      const int rounds = check::thorough() ? 400 : 80;
      for (int i = 0; i < rounds; ++i) try {
          const std::size_t index = random() % kModels;
          const ModelPtr& model = client.models[index];
          switch (random() % 8) {
            case 0: runtime.prewarm(model, kBackground); break;
            case 1: runtime.evict(model, in(kSoon), nullptr, WaitFor::leases_and_streams); break;
            case 2: runtime.cancel(runtime.prewarm(model, kForeground)); break;
            case 3: runtime.check_invariants(); break;
            case 4: {
              LayerSet one;
              one.insert(static_cast<std::uint32_t>(random() % kLayers.size()));
              const LeasePtr lease = runtime.begin_lease({{model, one}}, id + 1);
              runtime.await_lease(lease, in(kLong), nullptr);
              runtime.end_lease(lease);
              break;
            }
            default: {
              const LeasePtr lease = runtime.begin_lease({model}, id + 1);
              runtime.await_lease(lease, in(random() % 4 ? kLong : kSoon), nullptr);
              CHECK(client.files[index]->is_in(runtime, model));
              std::this_thread::yield();
              CHECK(client.files[index]->is_in(runtime, model));
              runtime.end_lease(lease);
            }
          }
        } catch (const Error& error) {
          using enum ErrorKind;
          if (error.kind() != busy && error.kind() != cancelled && error.kind() != timeout)
            check::fail(__FILE__, __LINE__, error.what());
        }
    });
  threads.clear();
  for (const auto& client : clients) client->close();
  served.expect_idle();
}

}  // namespace warmserve
