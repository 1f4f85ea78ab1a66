// A connection between a broker and a client: messages over a Unix socket, which keeps their
// boundaries and their order and can carry descriptors.
#pragma once

#include <deque>
#include <optional>
#include <string>

#include "wire/message.h"

namespace warmserve {

// Used by one thread at a time.
class Channel {
 public:
  // Connects to the broker that listens at `path`. Throws general, which says what is wrong there.
  static Channel connect(const std::string& path);
  explicit Channel(Descriptor socket) : socket_(std::move(socket)) {}

  int descriptor() const noexcept { return socket_.get(); }
  // Sends a message, or queues it while the socket is full. Does not block. Errors of the socket
  // are ignored here: receive() reports the end of the connection. The message keeps its
  // descriptors until it is sent.
  void send(Message message);
  // Sends queued messages. Returns true if none is left.
  bool flush();
  std::size_t queued() const noexcept { return queue_.size(); }
  // Returns the next message, or nullopt if none has arrived. Does not block. Throws `Ended` at the
  // end of the connection, and general for a message that is malformed.
  struct Ended {};
  std::optional<Message> receive();

 private:
  // A message as the socket takes it.
  struct Packet {
    std::uint32_t op, body_in_file;
    std::uint64_t request, body_bytes;
    std::vector<std::byte> body;
    std::vector<Descriptor> descriptors;
  };
  bool send_now(const Packet& packet);

  Descriptor socket_;
  std::deque<Packet> queue_;
};

// A socket at which clients connect. While it exists, no other process can listen at its path.
class Listener {
 public:
  // Throws general if another broker listens at the path, or if the path cannot be used. The folder
  // must belong to the caller, with mode 0700: a process that can write to it could take the
  // broker's place.
  explicit Listener(const std::string& path);
  ~Listener() { close(); }
  Listener(const Listener&) = delete;

  int descriptor() const noexcept { return socket_.get(); }
  // Removes the socket. Idempotent.
  void close();
  // Returns a new connection; an empty descriptor if there is none.
  Descriptor accept();

 private:
  const std::string path_;
  Descriptor lock_;  // locked while the listener exists
  Descriptor socket_;
};

}  // namespace warmserve
