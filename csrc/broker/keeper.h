// The keeper is a process that starts a broker, and the next one when that dies. It holds
// descriptors of the arena's memory (driver/host/slots.h) and of the contents record
// (memory/contents.h). For each client it holds two more: of the process, and of a ClientRecord.
#pragma once

#include <atomic>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include "base/descriptor.h"
#include "base/shared_mapping.h"
#include "base/types.h"

namespace warmserve {

// The granules that one client may map, in memory that outlives the broker. A granule is marked
// before the client is told of it, and cleared after the client has unmapped it.
class ClientRecord {
 public:
  // Makes the record of a new client. Throws general.
  ClientRecord(std::uint32_t granules, std::uint64_t token, std::uint64_t process,
               const std::string& name);
  // Reads the record that an earlier broker has made. Throws general if the memory is no such
  // record, or if it is of an arena of other granules.
  ClientRecord(Descriptor memory, std::uint32_t granules);
  ClientRecord(const ClientRecord&) = delete;

  int descriptor() const noexcept { return memory_.get(); }
  std::uint64_t token() const noexcept;
  std::uint64_t process() const noexcept;  // its number
  std::string name() const;

  void mark(std::span<const GranuleId> ids) noexcept;
  void clear(std::span<const GranuleId> ids) noexcept;
  bool marked(GranuleId id) const noexcept;
  std::vector<GranuleId> all_marked() const;

 private:
  struct Header;
  using Word = std::atomic<std::uint64_t>;
  static std::uint64_t bytes_for(std::uint32_t granules) noexcept;
  static Descriptor make_memory(std::uint32_t granules);
  ClientRecord(Descriptor memory, std::uint32_t granules, bool made);

  Descriptor memory_;
  SharedMapping mapping_;
  const std::uint32_t granules_;
  Header* const header_;  // in the mapping, like the words behind it
  Word* const words_;     // a bit for each granule
};

// A broker's end of the socket to its keeper. A message is "keep NAME" with descriptors, or
// "drop NAME".
class Keeper {
 public:
  explicit Keeper(Descriptor socket) : socket_(std::move(socket)) {}

  // Lets the keeper hold descriptors, for the next broker. They stay the caller's. Throws general
  // if the keeper does not read. Does not block.
  void keep(const std::string& name, std::initializer_list<int> descriptors);
  // Does nothing if the keeper has ended.
  void drop(const std::string& name) noexcept;

 private:
  bool send(const std::string& text, std::span<const int> descriptors) const noexcept;
  Descriptor socket_;
};

}  // namespace warmserve
