// A connection to a broker, and questions that need no runtime.
#pragma once

#include <chrono>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "wire/channel.h"

namespace warmserve {

// A connection that the broker has accepted.
struct BrokerConnection {
  // Connects to the broker at `path`. `version` is this package's, `name` names the client for
  // people. Throws general if no broker listens there, or if it refuses; timeout. Blocks.
  BrokerConnection(const std::string& path, const std::string& version, const std::string& name,
                   Deadline deadline, const Poll& poll)
      : BrokerConnection(path, version, name, 0, 0, deadline, poll) {}
  // Connects again, after the end of another connection.
  BrokerConnection(const BrokerConnection& earlier, Deadline deadline, const Poll& poll);

  std::string path, version, name;
  Channel channel;
  std::uint64_t granule_bytes = 0, granules = 0;
  std::uint64_t arena = 0;  // a number that names the broker's arena
  std::uint64_t token = 0;  // by which this client is known when it connects again
  bool known = false;       // the broker knows what the earlier connection has mapped
  // How long loads wait for another broker at the path if this one ends.
  std::chrono::milliseconds patience{5000};

  // Sends a request before anything else uses the channel, and returns the answer. Messages that
  // arrive before it wait in `earlier`. Blocks.
  Message ask(Message question, Deadline deadline, const Poll& poll);
  // Returns the next message, as Channel::receive().
  std::optional<Message> receive();
  std::deque<Message> earlier;
  bool ended = false;  // the broker has ended the connection while ask() waited

 private:
  BrokerConnection(const std::string& path, const std::string& version, const std::string& name,
                   std::uint64_t arena, std::uint64_t token, Deadline deadline, const Poll& poll);
};

// The state of a broker, as it tells it.
struct BrokerState {
  struct Mapped {
    std::string model;
    std::uint64_t layers = 0, layers_held = 0, bytes = 0;
  };
  struct Client {
    std::uint64_t id = 0, pid = 0;
    std::string name;
    bool stuck = false;  // has not answered in time
    bool ended = false;  // has closed its connection; its process still exists
    std::vector<Mapped> mapped;
  };
  struct Model {
    std::string name;
    std::uint64_t bytes = 0, bytes_resident = 0, leases = 0;
  };
  std::uint64_t granule_bytes = 0, granules = 0, granules_free = 0;
  std::uint64_t bytes_loaded = 0;  // since the broker began
  std::vector<Model> models;
  std::vector<Client> clients;
};
// Asks a broker for its state. Errors are those of BrokerConnection. Blocks.
BrokerState broker_state(BrokerConnection& connection, Deadline deadline, const Poll& poll);

// Returns the error that a message reports. The body continues behind it.
std::exception_ptr error_in(Reader& body);
// Waits until the socket is readable, or writable while messages are queued, or until a descriptor
// of `also` is readable. Returns false at the timeout. Blocks.
bool wait_for_socket(const Channel& channel, const std::vector<int>& also,
                     std::chrono::milliseconds timeout);

}  // namespace warmserve
