#include "broker/keeper.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/os_failure.h"

namespace warmserve {
namespace {

constexpr std::uint64_t kFormat = 0x7773636c69000001;  // changes with the layout of a record
constexpr std::size_t kMostDescriptors = 4;
constexpr unsigned kBits = 64;

}  // namespace

struct ClientRecord::Header {
  std::uint64_t format, granules, token, process;
  char name[96];  // ends with a zero
};

std::uint64_t ClientRecord::bytes_for(std::uint32_t granules) noexcept {
  return sizeof(Header) + ceil_div(granules, kBits) * sizeof(Word);
}

Descriptor ClientRecord::make_memory(std::uint32_t granules) {
  Descriptor memory(::memfd_create("warmserve-client", MFD_CLOEXEC));
  if (!memory || ::fchmod(memory.get(), S_IRUSR | S_IWUSR) != 0 ||
      ::ftruncate(memory.get(), static_cast<off_t>(bytes_for(granules))) != 0)
    throw Error(ErrorKind::general,
                os_failure("memfd_create for a client's record", errno, OsLimit::descriptors));
  return memory;
}

ClientRecord::ClientRecord(std::uint32_t granules, std::uint64_t token, std::uint64_t process,
                           const std::string& name)
    : ClientRecord(make_memory(granules), granules, false) {
  *header_ = {kFormat, granules, token, process, {}};
  std::memcpy(header_->name, name.data(), std::min(name.size(), sizeof header_->name - 1));
}

ClientRecord::ClientRecord(Descriptor memory, std::uint32_t granules)
    : ClientRecord(std::move(memory), granules, true) {}

ClientRecord::ClientRecord(Descriptor memory, std::uint32_t granules, bool made)
    : memory_(std::move(memory)),
      mapping_(memory_.get(), bytes_for(granules), "the record of a client"),
      granules_(granules),
      header_(static_cast<Header*>(mapping_.data())),
      words_(reinterpret_cast<Word*>(header_ + 1)) {
  if (made && (header_->format != kFormat || header_->granules != granules))
    throw Error(ErrorKind::general, "the record of a client is of another arena or version");
}

std::uint64_t ClientRecord::token() const noexcept { return header_->token; }
std::uint64_t ClientRecord::process() const noexcept { return header_->process; }
std::string ClientRecord::name() const {
  return {header_->name, ::strnlen(header_->name, sizeof header_->name)};
}

void ClientRecord::mark(std::span<const GranuleId> ids) noexcept {
  for (const GranuleId id : ids) words_[id / kBits] |= std::uint64_t{1} << id % kBits;
}

void ClientRecord::clear(std::span<const GranuleId> ids) noexcept {
  for (const GranuleId id : ids) words_[id / kBits] &= ~(std::uint64_t{1} << id % kBits);
}

bool ClientRecord::marked(GranuleId id) const noexcept {
  return words_[id / kBits] >> id % kBits & 1;
}

std::vector<GranuleId> ClientRecord::all_marked() const {
  std::vector<GranuleId> found;
  for (GranuleId id = 0; id < granules_; ++id)
    if (marked(id)) found.push_back(id);
  return found;
}

void Keeper::keep(const std::string& name, std::initializer_list<int> descriptors) {
  if (!send("keep " + name, std::span(descriptors.begin(), descriptors.size())))
    throw Error(ErrorKind::general, os_failure("a message to the keeper of the arena", errno));
}

void Keeper::drop(const std::string& name) noexcept { send("drop " + name, {}); }

bool Keeper::send(const std::string& text, std::span<const int> descriptors) const noexcept {
  if (!socket_ || descriptors.size() > kMostDescriptors) return false;
  iovec part{const_cast<char*>(text.data()), text.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMostDescriptors * sizeof(int))> control{};
  if (!descriptors.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(descriptors.size_bytes());
    std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size_bytes());
  }
  return ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
}

}  // namespace warmserve
