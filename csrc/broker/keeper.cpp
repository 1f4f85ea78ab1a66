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

ClientRecord::ClientRecord(std::uint32_t granules, std::uint64_t token, std::uint64_t process,
                           const std::string& name)
    : memory_(::memfd_create("warmserve-client", MFD_CLOEXEC)), granules_(granules) {
  const std::uint64_t bytes = sizeof(Header) + ceil_div(granules, kBits) * sizeof(Word);
  if (!memory_ || ::fchmod(memory_.get(), S_IRUSR | S_IWUSR) != 0 ||
      ::ftruncate(memory_.get(), static_cast<off_t>(bytes)) != 0)
    throw Error(ErrorKind::general,
                os_failure("memfd_create for a client's record", errno, OsLimit::descriptors));
  map();
  *header_ = {kFormat, granules, token, process, {}};
  std::memcpy(header_->name, name.data(), std::min(name.size(), sizeof header_->name - 1));
}

ClientRecord::ClientRecord(Descriptor memory, std::uint32_t granules)
    : memory_(std::move(memory)), granules_(granules) {
  struct stat status{};
  const bool fits = ::fstat(memory_.get(), &status) == 0 &&
                    static_cast<std::uint64_t>(status.st_size) >=
                        sizeof(Header) + ceil_div(granules, kBits) * sizeof(Word);
  if (fits) map();
  if (fits && header_->format == kFormat && header_->granules == granules) return;
  if (header_) ::munmap(header_, sizeof(Header) + ceil_div(granules, kBits) * sizeof(Word));
  throw Error(ErrorKind::general, "the record of a client is of another arena or version");
}

ClientRecord::~ClientRecord() {
  ::munmap(header_, sizeof(Header) + ceil_div(granules_, kBits) * sizeof(Word));
}

void ClientRecord::map() {
  const std::uint64_t bytes = sizeof(Header) + ceil_div(granules_, kBits) * sizeof(Word);
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory_.get(), 0);
  if (mapped == MAP_FAILED)
    throw Error(ErrorKind::general,
                os_failure("mmap of a client's record", errno, OsLimit::addresses));
  ::madvise(mapped, bytes, MADV_DONTFORK);
  header_ = static_cast<Header*>(mapped);
  words_ = reinterpret_cast<Word*>(header_ + 1);
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
