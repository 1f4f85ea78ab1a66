// The messages between a broker and its clients, and the encoding of their bodies.
//
// README.md beside this file has the protocol: who sends which message, and what answers it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/descriptor.h"

namespace warmserve {

// Incremented by every change of a message. Broker and client must have the same number.
constexpr std::uint32_t kProtocol = 2;

enum class Op : std::uint32_t {
  // From a client. Requests, which have a number, are answered by `done` or `error`.
  hello,     // request: version of the package, name of the client
  files,     // descriptors of a model's files, for the next `enroll`
  enroll,    // request: a model's name, files, layers and digests; `done` has its number
  want,      // request: layers to load and to map
  cancel,    // the layers of this request are not wanted any more
  unmapped,  // the client has unmapped these layers
  held,      // leases use these layers that were revoked; `unmapped` follows when they have ended
  evict,     // request: layers to evict
  keep,      // keep values of a model's layers
  bye,       // the client maps nothing any more, and handles no further message
  status,    // request: `done` has the state of the broker
  still_mapped,  // after hello and enroll: layers that an earlier connection has mapped
  // From a broker.
  welcome,  // answers hello: granules of the arena, and their size
  memory,   // a descriptor of memory that later `map` messages name; without one, from a client:
            // the descriptor was lost, and must be sent again
  map,      // layers, and where in memory their granules are
  revoke,   // unmap these layers
  done,     // a request has been carried out
  error,    // a request has failed: kind of error, sentence
};

struct Message {
  Op op{};
  std::uint64_t request = 0;  // 0: the message belongs to no request
  std::vector<std::byte> body{};
  std::vector<Descriptor> descriptors{};
  bool lost_descriptors = false;  // received, but this process has too many open files
};

// Writes a body: integers, texts and lists, one after the other.
class Writer {
 public:
  Writer& number(std::uint64_t value);
  Writer& real(double value);
  Writer& text(std::string_view value);
  Writer& numbers(const std::vector<std::uint32_t>& values);
  std::vector<std::byte> take() { return std::move(body_); }

 private:
  void bytes(const void* data, std::size_t count);
  std::vector<std::byte> body_;
};

// Reads a body. Throws general, which says that the message is malformed, if the body ends early or
// a count exceeds what is left of it.
class Reader {
 public:
  explicit Reader(const std::vector<std::byte>& body) : body_(body) {}

  std::uint64_t number();
  std::uint32_t small_number();  // also throws if it exceeds 32 bits
  double real();
  std::string text();
  std::vector<std::uint32_t> numbers();
  // Reads the count of a list whose elements take at least `least` bytes each.
  std::size_t count(std::size_t least);
  // Throws unless the whole body was read.
  void end() const;

 private:
  void bytes(void* data, std::size_t count);
  const std::vector<std::byte>& body_;
  std::size_t at_ = 0;
};

}  // namespace warmserve
