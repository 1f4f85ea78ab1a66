#include "wire/channel.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/os_failure.h"

namespace warmserve {
namespace {

// A body of more bytes is sent as a memory file, because the socket limits messages.
constexpr std::size_t kMostInline = 32 * 1024;
constexpr std::uint64_t kMostBody = 256 * kMiB;
constexpr decltype(statfs::f_type) kTmpfs = 0x01021994;
constexpr std::size_t kMostDescriptors = 253;  // the kernel's limit for one message

struct Header {
  std::uint32_t op;
  std::uint32_t body_in_file;  // 1: the first descriptor is a file with the body
  std::uint64_t request;
  std::uint64_t bytes;  // of the body
};

[[noreturn]] void fail(const std::string& call, OsLimit limit = OsLimit::none) {
  throw Error(ErrorKind::general, os_failure(call, errno, limit));
}

// The address of a socket file. A path that is too long for an address is reached through the
// descriptor of its folder.
struct SocketAddress {
  explicit SocketAddress(const std::string& path) {
    std::string shown = path;
    if (shown.size() >= sizeof address.sun_path) {
      const auto slash = path.rfind('/');
      const std::string parent = slash == std::string::npos ? "." : path.substr(0, slash + 1);
      folder = Descriptor(::open(parent.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
      if (!folder) fail("open of " + parent);
      shown = "/proc/self/fd/" + std::to_string(folder.get()) + "/" +
              path.substr(slash == std::string::npos ? 0 : slash + 1);
      if (shown.size() >= sizeof address.sun_path)
        throw Error(ErrorKind::invalid_argument, "the name of the socket is too long: " + path);
    }
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, shown.c_str(), shown.size() + 1);
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }

  sockaddr_un address{};
  Descriptor folder;
};

Descriptor make_socket() {
  Descriptor made(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!made) fail("socket", OsLimit::descriptors);
  return made;
}

Descriptor file_of(const std::vector<std::byte>& body) {
  Descriptor file(::memfd_create("warmserve-message", MFD_CLOEXEC));
  if (!file) fail("memfd_create of a message", OsLimit::descriptors);
  for (std::size_t at = 0; at < body.size();) {
    const ssize_t written = ::write(file.get(), body.data() + at, body.size() - at);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail("write of a message of " + format_bytes(body.size()));
    at += static_cast<std::size_t>(written);
  }
  return file;
}

// Reads a body out of the sender's file. The sender may still change the file, so it is copied and
// never mapped.
std::vector<std::byte> body_of(const Descriptor& file, std::uint64_t bytes) {
  struct statfs system{};
  struct stat status{};
  if (::fstatfs(file.get(), &system) != 0 || system.f_type != kTmpfs ||
      ::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode))  // others may block
    throw Error(ErrorKind::general, "the other process sent a message in a file that is no memfd");
  std::vector<std::byte> body(bytes);
  for (std::size_t at = 0; at < body.size();) {
    const ssize_t got =
        ::pread(file.get(), body.data() + at, body.size() - at, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0)
      throw Error(ErrorKind::general, "the other process sent a message that ends early");
    at += static_cast<std::size_t>(got);
  }
  return body;
}

}  // namespace

Channel Channel::connect(const std::string& path) {
  Channel channel(make_socket());
  const SocketAddress address(path);
  if (::connect(channel.descriptor(), address.get(), sizeof address.address) == 0) return channel;
  switch (errno) {
    case ENOENT: throw Error(ErrorKind::general, "no broker listens at " + path);
    case ECONNREFUSED:
      throw Error(ErrorKind::general, "the broker that listened at " + path + " has ended");
    case EAGAIN:
      throw Error(ErrorKind::general, "the broker at " + path + " accepts no connections now");
    case EPROTOTYPE:
      throw Error(ErrorKind::general, path + " is the socket of another program, not of a broker");
    default: fail("connect to " + path);
  }
}

void Channel::send(Message message) {
  Packet packet{static_cast<std::uint32_t>(message.op),
                0,
                message.request,
                message.body.size(),
                std::move(message.body),
                std::move(message.descriptors)};
  if (packet.body.size() > kMostInline) {
    packet.descriptors.insert(packet.descriptors.begin(), file_of(packet.body));
    packet.body.clear();
    packet.body_in_file = 1;
  }
  if (!queue_.empty() || !send_now(packet)) queue_.push_back(std::move(packet));
}

bool Channel::flush() {
  while (!queue_.empty() && send_now(queue_.front())) queue_.pop_front();
  return queue_.empty();
}

// Returns false if the socket is full.
bool Channel::send_now(const Packet& packet) {
  Header header{packet.op, packet.body_in_file, packet.request, packet.body_bytes};
  iovec parts[] = {{&header, sizeof header},
                   {const_cast<std::byte*>(packet.body.data()), packet.body.size()}};
  msghdr out{};
  out.msg_iov = parts;
  out.msg_iovlen = 2;
  alignas(cmsghdr) char control[CMSG_SPACE(kMostDescriptors * sizeof(int))];
  if (const std::size_t count = packet.descriptors.size()) {
    out.msg_control = control;
    out.msg_controllen = CMSG_SPACE(count * sizeof(int));
    cmsghdr* const attached = CMSG_FIRSTHDR(&out);
    attached->cmsg_level = SOL_SOCKET;
    attached->cmsg_type = SCM_RIGHTS;
    attached->cmsg_len = CMSG_LEN(count * sizeof(int));
    for (std::size_t i = 0; i < count; ++i) {
      const int descriptor = packet.descriptors[i].get();
      std::memcpy(CMSG_DATA(attached) + i * sizeof(int), &descriptor, sizeof descriptor);
    }
  }
  while (::sendmsg(socket_.get(), &out, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
    if (errno == EINTR) continue;
    // Too many descriptors of this user are under way: they leave when the other process reads.
    return errno != EAGAIN && errno != ENOBUFS && errno != ETOOMANYREFS;
  }
  return true;
}

std::optional<Message> Channel::receive() {
  Header header{};
  Message message;
  message.body.resize(kMostInline);
  iovec parts[] = {{&header, sizeof header}, {message.body.data(), message.body.size()}};
  alignas(cmsghdr) char control[CMSG_SPACE(kMostDescriptors * sizeof(int))];
  msghdr in{};
  in.msg_iov = parts;
  in.msg_iovlen = 2;
  in.msg_control = control;
  in.msg_controllen = sizeof control;
  ssize_t got = 0;
  bool reset = false;  // said once, before messages that were sent earlier
  do got = ::recvmsg(socket_.get(), &in, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  while (got < 0 && (errno == EINTR || (errno == ECONNRESET && !std::exchange(reset, true))));
  if (got < 0 && errno == EAGAIN) return std::nullopt;
  if (got <= 0) throw Ended();
  for (cmsghdr* each = CMSG_FIRSTHDR(&in); each; each = CMSG_NXTHDR(&in, each)) {
    if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int descriptor = -1;
      std::memcpy(&descriptor, CMSG_DATA(each) + i * sizeof(int), sizeof descriptor);
      message.descriptors.emplace_back(descriptor);
    }
  }
  message.lost_descriptors = in.msg_flags & MSG_CTRUNC;
  const auto bytes = static_cast<std::size_t>(got);
  const std::size_t inline_bytes = bytes - std::min(bytes, sizeof header);
  const bool in_file = header.body_in_file == 1;
  const bool valid = (in.msg_flags & MSG_TRUNC) == 0 && bytes >= sizeof header &&
                     header.op <= static_cast<std::uint32_t>(Op::error) &&
                     header.body_in_file <= 1 && header.bytes <= kMostBody &&
                     (in_file ? !message.descriptors.empty() : header.bytes == inline_bytes);
  if (!valid) throw Error(ErrorKind::general, "the other process sent a malformed message");
  message.op = static_cast<Op>(header.op);
  message.request = header.request;
  if (in_file) {
    message.body = body_of(message.descriptors.front(), header.bytes);
    message.descriptors.erase(message.descriptors.begin());
  } else {
    message.body.resize(inline_bytes);
  }
  return message;
}

namespace {

// Removes the socket of a broker that has ended. The caller has the lock of the path. Throws
// general if anything else has this path.
void remove_stale(const std::string& path, const SocketAddress& address) {
  struct stat status{};
  if (::lstat(path.c_str(), &status) != 0) return;
  if (!S_ISSOCK(status.st_mode))
    throw Error(ErrorKind::general, path + " exists and is not a socket");
  const Descriptor probe = make_socket();
  if (::connect(probe.get(), address.get(), sizeof address.address) == 0 || errno != ECONNREFUSED)
    throw Error(ErrorKind::general, "another program listens at " + path);
  ::unlink(path.c_str());
}

}  // namespace

Listener::Listener(const std::string& path) : path_(path) {
  const auto slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  struct stat status{};
  if (::stat(folder.c_str(), &status) != 0) fail("stat of " + folder);
  if (status.st_uid != ::geteuid() || (status.st_mode & 077) != 0)
    throw Error(ErrorKind::general,
                "the folder of a broker's socket must belong to its user, with mode 0700, and " +
                    folder + " does not: another user could take the broker's place");
  const std::string lock = path + ".lock";
  lock_ = Descriptor(::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock_) fail("open of " + lock);
  if (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0)
    throw Error(ErrorKind::general, "another broker listens at " + path);
  socket_ = make_socket();
  const SocketAddress address(path);
  remove_stale(path, address);
  if (::bind(socket_.get(), address.get(), sizeof address.address) != 0) fail("bind to " + path);
  if (::chmod(path.c_str(), 0600) != 0) fail("chmod of " + path);
  if (::listen(socket_.get(), 128) != 0) fail("listen at " + path);
}

void Listener::close() {
  if (!socket_) return;
  ::unlink(path_.c_str());  // before the lock is free
  socket_ = Descriptor();
  lock_ = Descriptor();
}

Descriptor Listener::accept() {
  return Descriptor(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

}  // namespace warmserve
