// Serves a runtime's arena to other processes.
//
// One thread accepts clients, reads their messages, and sends them the layers that have become
// resident. Threads that evict layers ask clients to unmap them, through revoke(). A granule is
// reused only when no client may map it: each client that did has said so, or its process has
// ended. wire/README.md has the protocol.
#pragma once

#include <condition_variable>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "broker/keeper.h"
#include "runtime/runtime.h"
#include "wire/channel.h"

namespace warmserve {

class BrokerServer final : public Clients {
 public:
  struct Options {
    std::string path;     // of the socket
    std::string version;  // of the package, for messages
    // How long an eviction waits for a client's answer. Afterwards the layer counts as used by the
    // client, and other layers are evicted.
    std::chrono::milliseconds patience{100};
    // A socket to the keeper (keeper.h), or -1; and the clients of an earlier broker of this
    // memory: descriptors of the process and of the record. All stay the caller's.
    int keeper = -1;
    std::vector<std::pair<int, int>> former_clients{};
  };
  // Starts to serve. The runtime shares the server, whose threads end
  // before it is destroyed. Throws general if the path cannot be used or another broker listens
  // there; invalid_argument if the runtime's device cannot be shared; busy if a process still maps
  // layers of an earlier broker.
  static std::shared_ptr<BrokerServer> make(Runtime& runtime, const Options& options);
  ~BrokerServer() override { stop(); }

  // Ends all connections. Clients keep what they have mapped, so revoke() goes on to refuse it.
  // Idempotent. Blocks.
  void stop();
  bool any_mapped() override;
  void end_holds_if_stopped() override;
  void revoke(std::span<Layer* const> layers, const Poll& poll) override;

 private:
  // Layers of a client that an eviction wanted and that the client still uses.
  struct Hold {
    ModelPtr model;
    LayerSet layers;
    LeasePtr lease;
  };
  // A request for layers that are not all mapped by the client yet.
  struct Pending {
    std::uint64_t request;
    Selection wanted;
    LayerSet left;
    LeasePtr lease;  // one of the two; neither while the lease could wait for ever
    TicketPtr ticket;
    Deadline refused_since{};
  };
  struct Client {
    Client(std::uint64_t number, Descriptor socket) : id(number), channel(std::move(socket)) {}

    const std::uint64_t id;
    Channel channel;
    Descriptor process;  // a pidfd, which is readable when the process has ended
    std::uint64_t pid = 0;
    std::uint64_t token = 0;  // by which it is known when it connects again
    std::string name;
    bool welcome = false;  // has said hello
    bool closing = false;  // to be ended when its messages are sent
    bool ended = false;  // its connection has ended; its process may still read what it has mapped
    bool stuck = false;  // has not answered in time since its last message
    std::vector<Descriptor> files;              // for its next enroll
    std::map<std::uint64_t, LayerSet> mapped;   // what it may map, by the model's id
    std::map<std::uint64_t, LayerSet> revoked;  // of these, what it was asked to unmap
    std::list<Hold> holds;
    std::list<Pending> pending;
    std::set<std::uint64_t> memory;  // numbers of the files that it has
    // With a keeper: what it may map, for the next broker; and the same by the model's id and the
    // layer.
    std::unique_ptr<ClientRecord> record;
    std::map<std::pair<std::uint64_t, std::uint32_t>, std::vector<GranuleId>> granules;
    bool settled = true;  // false: the record is an earlier broker's, and has more than `mapped`

    bool may_map() const noexcept { return !mapped.empty() || !settled; }
  };
  using ClientPtr = std::shared_ptr<Client>;

  BrokerServer(Runtime& runtime, const Options& options);
  void take_over(const Options& options);
  void start();
  void forget_ended();
  // Memory that granules lie in.
  struct Memory {
    Descriptor descriptor;
    std::uint64_t number;
  };
  struct Place {
    std::uint64_t memory, offset;
  };

  // A thread that carries out one request.
  struct Eviction {
    std::uint64_t client = 0;
    bool done = false;  // it has only to return
    std::thread thread;
  };

  void run();
  void accept();
  void read(Client& client);
  void refuse(Client& client, const Error& error);
  void handle(Client& client, Message message);
  void hello(Client& client, const Message& message);
  Client& resumed(Client& client, std::uint64_t token);
  void still_mapped(Client& client, Reader body);
  void enroll(Client& client, const Message& message);
  void want(Client& client, const Message& message);
  void cancel(Client& client, Reader body);
  void unmapped(Client& client, Reader body);
  void held(Client& client, Reader body);
  void evict(Client& client, const Message& message);
  void carry_out(const std::weak_ptr<Client>& of, std::uint64_t request, const Selection& selection,
                 WaitFor wait_for, Deadline deadline);
  void keep(Client& client, Reader body);
  void status(Client& client, std::uint64_t request);
  void advance(Client& client);
  void begin_lease(Client& client, Pending& pending);
  void fail(Client& client, Pending& pending, std::exception_ptr error);
  void send_granted(Client& client, const Model& model,
                    const std::vector<Runtime::Granted>& granted);
  void send_memory(Client& client, std::uint64_t number);
  void end_pending(Pending& pending);
  void end_connection(Client& client);
  void forget(Client& client);
  void queue_again();
  void hold(Client& client, const ModelPtr& model, const LayerSet& layers);
  void drop_mapped(Client& client, const ModelPtr& model, const LayerSet& layers);
  void add_mapped(Client& client, const Model& model, std::uint32_t layer,
                  const std::vector<GranuleId>& granules);
  void recognize(Client& client, std::span<Layer* const> layers);
  void settle(Client& client);
  void end_record(Client& client);
  void free_unless_marked(const std::vector<GranuleId>& ids);
  void send(Client& client, Message message);
  void send_revoke(Client& client, std::uint64_t model, const LayerSet& layers);
  void send_error(Client& client, std::uint64_t request, std::exception_ptr error,
                  std::vector<std::byte> rest = {});
  static Descriptor duplicated(int descriptor, const char* of);
  Place place_of(GranuleId id);
  ModelPtr model_of(std::uint64_t id) const;
  Selection selection_of(Reader& body) const;

  Runtime& runtime_;
  const std::string version_;
  const std::chrono::milliseconds patience_;
  std::uint64_t arena_id_ = 0;
  std::optional<Keeper> keeper_;
  std::optional<Listener> listener_;  // until stop(); used by the thread
  int changes_ = -1;
  std::uint64_t granule_bytes_ = 0, granules_ = 0;

  // Guards all below. Taken before the runtime's lock, and never waited for under it.
  std::mutex mutex_;
  std::condition_variable answered_;  // a client has unmapped, refused or ended
  std::vector<ClientPtr> clients_;
  std::map<std::uint64_t, ModelPtr> models_;
  std::map<std::pair<std::uint64_t, std::uint64_t>, Memory> memories_;  // by device and inode
  std::map<GranuleId, Place> places_;
  std::list<Eviction> evictions_;
  std::uint64_t next_client_ = 0;
  bool stopping_ = false;
  EventFd wake_;            // ends the thread's wait
  Deadline accept_from_{};  // after a lack of descriptors; used by the thread

  std::thread thread_;  // last: it uses all members above
};

}  // namespace warmserve
