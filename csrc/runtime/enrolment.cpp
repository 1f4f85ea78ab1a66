#include "runtime/enrolment.h"

#include <fcntl.h>

#include <cerrno>
#include <utility>

#include "base/os_failure.h"

namespace warmserve {

std::vector<Message> files_of(const Model& model) {
  constexpr std::size_t kFilesPerMessage = 200;
  std::vector<Message> messages;
  for (const File& file : model.files) {
    if (messages.empty() || messages.back().descriptors.size() == kFilesPerMessage)
      messages.push_back({.op = Op::files});
    Descriptor descriptor(::fcntl(file.descriptor(), F_DUPFD_CLOEXEC, 0));
    if (!descriptor)
      throw Error(ErrorKind::general, os_failure("fcntl(F_DUPFD_CLOEXEC) of " + file.path(), errno,
                                                 OsLimit::descriptors));
    messages.back().descriptors.push_back(std::move(descriptor));
  }
  return messages;
}

Message enrolment_of(const Model& model) {
  Writer writer;
  writer.text(model.name).number(model.files.size());
  for (const File& file : model.files) {
    const FileIdentity& id = file.identity();
    writer.text(file.path()).number(id.device).number(id.inode).number(id.size);
    writer.number(id.mtime_ns).number(id.ctime_ns);
  }
  writer.number(model.layers.size());
  for (const Layer& layer : model.layers) {
    writer.number(layer.bytes).number(layer.source.segments.size());
    for (const Segment& segment : layer.source.segments) {
      writer.number(segment.file).number(segment.file_offset).number(segment.layer_offset);
      writer.number(segment.bytes);
      writer.number(segment.cast ? static_cast<std::uint64_t>(*segment.cast) + 1 : 0);
    }
    writer.number(layer.source.digests.size());
    for (const ExpectedDigest& digest : layer.source.digests)
      writer.number(digest.granule).number(digest.digest);
  }
  return {.op = Op::enroll, .request = 2, .body = writer.take()};
}

}  // namespace warmserve
