#include "broker/server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "base/os_failure.h"
#include "base/random_number.h"

namespace warmserve {
namespace {

constexpr int kPeerPidfd = 77;  // SO_PEERPIDFD; the C library's headers may be too old for it
constexpr int kMessagesPerTurn = 64;
constexpr std::chrono::milliseconds kAcceptAgain{500};
constexpr std::size_t kMostQueued = 1000;  // messages to a client that does not read them

// Returns a descriptor that becomes readable when the process of the other end has ended. The
// socket's own works across namespaces of process numbers.
Descriptor process_of(int socket, const ucred& peer) {
  int descriptor = -1;
  socklen_t bytes = sizeof descriptor;
  if (::getsockopt(socket, SOL_SOCKET, kPeerPidfd, &descriptor, &bytes) == 0)
    return Descriptor(descriptor);
  return Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)));
}

}  // namespace

BrokerServer::BrokerServer(Runtime& runtime, const Options& options)
    : runtime_(runtime),
      version_(options.version),
      patience_(options.patience),
      listener_(std::in_place, options.path) {
  const RuntimeState state = runtime_.state();
  granule_bytes_ = state.granule_bytes;
  granules_ = state.granules;
  arena_id_ = runtime_.arena_id();
  if (!arena_id_) arena_id_ = random_number();
  wake_.descriptor();
  if (options.keeper >= 0) take_over(options);
}

std::shared_ptr<BrokerServer> BrokerServer::make(Runtime& runtime, const Options& options) {
  if (!runtime.device()->facts().host_view)
    throw Error(
        ErrorKind::invalid_argument,
        "a broker can share the host's memory only, not that of " + runtime.device()->facts().name);
  const std::shared_ptr<BrokerServer> server(new BrokerServer(runtime, options));
  server->changes_ = runtime.serve(server);
  server->start();
  return server;
}

void BrokerServer::start() {
  try {
    thread_ = std::thread(&BrokerServer::run, this);
  } catch (const std::system_error& error) {
    throw Error(ErrorKind::general,
                os_failure("starting the broker's thread", error.code().value(), OsLimit::threads));
  }
}

void BrokerServer::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    wake_.signal();
    answered_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
  std::list<Eviction> evictions;
  {
    const std::lock_guard lock(mutex_);
    listener_.reset();  // another broker may listen at the path now
    evictions.swap(evictions_);
  }
  for (Eviction& eviction : evictions) eviction.thread.join();
  const std::lock_guard lock(mutex_);
  for (const ClientPtr& client : clients_) end_connection(*client);
}

void BrokerServer::run() {
  std::vector<pollfd> waited;
  std::vector<ClientPtr> clients;
  for (;;) {
    auto timeout = std::chrono::milliseconds(1000);
    waited = {{wake_.descriptor(), POLLIN, 0},
              {changes_, POLLIN, 0},
              {Clock::now() < accept_from_ ? -1 : listener_->descriptor(), POLLIN, 0}};
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
      clients = clients_;
      for (const ClientPtr& client : clients) {
        for (const Pending& pending : client->pending)
          if (!pending.lease && !pending.ticket) timeout = kPollInterval;
        const std::size_t queued = client->channel.queued();
        // A client that reads no answers may ask no more.
        const bool full = client->closing || queued > kMostQueued;
        const short events = full ? POLLOUT : queued ? POLLIN | POLLOUT : POLLIN;
        waited.push_back({client->ended ? -1 : client->channel.descriptor(), events, 0});
        waited.push_back({client->process.get(), POLLIN, 0});
      }
    }
    ::poll(waited.data(), waited.size(), static_cast<int>(timeout.count()));
    runtime_.clear_changes();
    const std::lock_guard lock(mutex_);
    wake_.clear();
    if (waited[2].revents) accept();
    for (std::size_t i = 0; i < clients.size(); ++i) {
      Client& client = *clients[i];
      if (waited[3 + 2 * i].revents) read(client);
      if (waited[4 + 2 * i].revents) {  // its mappings have ended with it
        end_connection(client);
        forget(client);
      }
    }
    for (const ClientPtr& client : clients_) {
      if (client->ended) continue;
      try {
        advance(*client);
      } catch (const Error& error) {
        refuse(*client, error);
      }
      client->channel.flush();
      if (client->closing && !client->channel.queued()) end_connection(*client);
    }
    std::erase_if(clients_,
                  [](const ClientPtr& client) { return client->ended && !client->may_map(); });
  }
}

void BrokerServer::accept() {
  while (Descriptor socket = listener_->accept()) {
    ucred peer{};
    socklen_t bytes = sizeof peer;
    if (::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) continue;
    auto client = std::make_shared<Client>(++next_client_, std::move(socket));
    client->pid = static_cast<std::uint64_t>(peer.pid);
    client->process = process_of(client->channel.descriptor(), peer);
    const char* refused = nullptr;
    if (peer.uid != ::geteuid() && peer.uid != 0)
      refused = "this broker serves the processes of its own user only";
    else if (!client->process)
      refused = "the broker cannot watch this process: pidfd_open() failed";
    if (refused) {
      send_error(*client, 1, std::make_exception_ptr(Error(ErrorKind::general, refused)));
      client->closing = true;
    }
    clients_.push_back(std::move(client));
  }
  // The connection that could not be accepted stays readable, so the thread looks away.
  if (errno == EMFILE || errno == ENFILE) accept_from_ = Clock::now() + kAcceptAgain;
}

void BrokerServer::read(Client& client) {
  if (client.ended) return;
  try {
    for (int left = kMessagesPerTurn; left > 0 && !client.closing; --left) {
      std::optional<Message> message = client.channel.receive();
      if (!message) return;
      client.stuck = false;
      handle(client, std::move(*message));
      if (client.ended) return;
    }
  } catch (const Channel::Ended&) {
    end_connection(client);
  } catch (const Error& error) {  // malformed: nothing of this client can be trusted any more
    refuse(client, error);
  }
}

// Forgets the clients whose processes have ended, for when the thread has ended too.
void BrokerServer::forget_ended() {
  for (const ClientPtr& client : clients_) {
    pollfd ended{client->process.get(), POLLIN, 0};
    if (::poll(&ended, 1, 0) > 0) forget(*client);
  }
}

bool BrokerServer::any_mapped() {
  const std::lock_guard lock(mutex_);
  forget_ended();
  return std::ranges::any_of(clients_, [](const ClientPtr& each) { return each->may_map(); });
}

void BrokerServer::end_holds_if_stopped() {
  const std::lock_guard lock(mutex_);
  if (!stopping_) return;
  for (const ClientPtr& client : clients_)
    for (const Hold& hold : std::exchange(client->holds, {})) runtime_.end_hold(hold.lease);
}

// Tells a client why its connection is about to end.
void BrokerServer::refuse(Client& client, const Error& error) {
  send_error(client, 0, std::make_exception_ptr(error));
  client.closing = true;
}

// Ends a client's requests. Layers that it may have mapped stay counted until its process ends.
void BrokerServer::end_connection(Client& client) {
  client.ended = true;
  ::shutdown(client.channel.descriptor(), SHUT_RDWR);
  for (Pending& pending : client.pending) end_pending(pending);
  client.pending.clear();
  answered_.notify_all();
}

// Forgets what a client may have mapped: it has unmapped all, or its process has ended.
void BrokerServer::forget(Client& client) {
  client.mapped.clear();
  client.revoked.clear();
  end_record(client);
  for (const Hold& hold : std::exchange(client.holds, {})) runtime_.end_hold(hold.lease);
  answered_.notify_all();
}

Descriptor BrokerServer::duplicated(int descriptor, const char* of) {
  Descriptor made = Descriptor::duplicate(descriptor);
  if (!made)
    throw Error(ErrorKind::general, os_failure(std::string("fcntl(F_DUPFD_CLOEXEC) of ") + of,
                                               errno, OsLimit::descriptors));
  return made;
}

void BrokerServer::end_pending(Pending& pending) {
  if (pending.lease) runtime_.end_lease(std::exchange(pending.lease, nullptr));
  if (pending.ticket) runtime_.cancel(std::exchange(pending.ticket, nullptr));
}

void BrokerServer::send(Client& client, Message message) {
  if (client.ended) return;
  client.channel.send(std::move(message));
  if (client.channel.queued()) wake_.signal();
}

void BrokerServer::send_error(Client& client, std::uint64_t request, std::exception_ptr error,
                              std::vector<std::byte> rest) {
  ErrorKind kind = ErrorKind::general;
  std::string text;
  try {
    std::rethrow_exception(error);
  } catch (const Error& known) {
    kind = known.kind();
    text = known.what();
  } catch (const std::exception& other) {
    text = other.what();
  }
  std::vector<std::byte> body = Writer().number(static_cast<std::uint64_t>(kind)).text(text).take();
  body.insert(body.end(), rest.begin(), rest.end());
  send(client, {.op = Op::error, .request = request, .body = std::move(body)});
}

}  // namespace warmserve
