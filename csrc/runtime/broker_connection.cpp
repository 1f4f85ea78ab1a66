#include "runtime/broker_connection.h"

#include <poll.h>

#include <utility>

namespace warmserve {

bool wait_for_socket(const Channel& channel, const std::vector<int>& also,
                     std::chrono::milliseconds timeout) {
  std::vector<pollfd> all{{channel.descriptor(), POLLIN, 0}};
  if (channel.queued()) all.front().events |= POLLOUT;
  for (const int descriptor : also) all.push_back({descriptor, POLLIN, 0});
  return ::poll(all.data(), all.size(), static_cast<int>(timeout.count())) > 0;
}

std::exception_ptr error_in(Reader& body) {
  const std::uint64_t kind = body.number();
  const std::string text = body.text();
  return std::make_exception_ptr(Error(kind <= static_cast<std::uint64_t>(ErrorKind::device_lost)
                                           ? static_cast<ErrorKind>(kind)
                                           : ErrorKind::general,
                                       text));
}

BrokerConnection::BrokerConnection(const BrokerConnection& earlier, Deadline deadline,
                                   const Poll& poll)
    : BrokerConnection(earlier.path, earlier.version, earlier.name, earlier.arena, earlier.token,
                       deadline, poll) {
  patience = earlier.patience;
}

BrokerConnection::BrokerConnection(const std::string& at, const std::string& package,
                                   const std::string& client, std::uint64_t earlier_arena,
                                   std::uint64_t earlier_token, Deadline deadline, const Poll& poll)
    : path(at), version(package), name(client), channel(Channel::connect(at)) {
  Writer hello;
  hello.number(kProtocol).text(version).text(name).number(earlier_arena).number(earlier_token);
  const Message answer = ask({.op = Op::hello, .request = 1, .body = hello.take()}, deadline, poll);
  Reader body(answer.body);
  if (answer.op != Op::welcome)
    throw Error(ErrorKind::general, "the program at " + path + " does not answer as a broker");
  granule_bytes = body.number();
  granules = body.number();
  arena = body.number();
  token = body.number();
  known = body.number();
}

Message BrokerConnection::ask(Message question, Deadline deadline, const Poll& poll) {
  const std::uint64_t request = question.request;
  channel.send(std::move(question));
  try {
    for (;;) {
      if (std::optional<Message> answer = channel.receive()) {
        // An error without a request says why the broker ends the connection.
        ended = answer->op == Op::error && !answer->request;
        if (answer->request != request && !ended) {
          earlier.push_back(std::move(*answer));
          continue;
        }
        if (answer->op != Op::error) return std::move(*answer);
        Reader body(answer->body);
        std::rethrow_exception(error_in(body));
      }
      if (Clock::now() >= deadline)
        throw Error(ErrorKind::timeout, "the broker at " + path + " did not answer in time");
      channel.flush();
      wait_for_socket(channel, {}, kPollInterval);
      if (poll) poll();
    }
  } catch (const Channel::Ended&) {
    ended = true;
    throw Error(ErrorKind::general, "the broker at " + path + " ended the connection");
  }
}

std::optional<Message> BrokerConnection::receive() {
  if (earlier.empty()) return channel.receive();
  Message message = std::move(earlier.front());
  earlier.pop_front();
  return message;
}

BrokerState broker_state(BrokerConnection& connection, Deadline deadline, const Poll& poll) {
  const Message answer = connection.ask({.op = Op::status, .request = 1}, deadline, poll);
  Reader body(answer.body);
  BrokerState state;
  state.granule_bytes = body.number();
  state.granules = body.number();
  state.granules_free = body.number();
  state.bytes_loaded = body.number();
  state.models.resize(body.count(4 * sizeof(std::uint64_t)));
  for (BrokerState::Model& model : state.models) {
    model.name = body.text();
    model.bytes = body.number();
    model.bytes_resident = body.number();
    model.leases = body.number();
  }
  state.clients.resize(body.count(6 * sizeof(std::uint64_t)));
  for (BrokerState::Client& client : state.clients) {
    client.id = body.number();
    client.pid = body.number();
    client.name = body.text();
    client.stuck = body.number();
    client.ended = body.number();
    client.mapped.resize(body.count(4 * sizeof(std::uint64_t)));
    for (BrokerState::Mapped& mapped : client.mapped) {
      mapped.model = body.text();
      mapped.layers = body.number();
      mapped.layers_held = body.number();
      mapped.bytes = body.number();
    }
  }
  body.end();
  return state;
}

}  // namespace warmserve
