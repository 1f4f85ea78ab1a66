#include "model/content_key.h"

#include <bit>
#include <string_view>

namespace warmserve {
namespace {

// Mixes the bits of a number: the finalizer of MurmurHash3.
std::uint64_t mixed(std::uint64_t value) noexcept {
  value = (value ^ (value >> 33)) * 0xff51afd7ed558ccd;
  value = (value ^ (value >> 33)) * 0xc4ceb9fe1a85ec53;
  return value ^ (value >> 33);
}

class Hash {
 public:
  Hash& add(std::uint64_t value) noexcept {
    low_ = mixed(low_ ^ value) + 0x9e3779b97f4a7c15;
    high_ = mixed(high_ + std::rotl(value, 32)) ^ low_;
    return *this;
  }
  Hash& add(std::string_view text) noexcept {
    add(text.size());
    for (const char each : text) add(static_cast<unsigned char>(each));
    return *this;
  }
  ContentKey key() const noexcept { return {{mixed(low_) | 1, mixed(high_)}}; }  // never zero

 private:
  std::uint64_t low_ = 0, high_ = 0;
};

}  // namespace

ContentKey content_key(const Model& model, const Layer& layer) {
  Hash hash;
  hash.add(model.name).add(layer.index).add(layer.bytes);
  for (const Segment& segment : layer.source.segments) {
    const FileIdentity& file = model.files[segment.file].identity();
    hash.add(file.device).add(file.inode).add(file.size).add(file.mtime_ns).add(file.ctime_ns);
    hash.add(segment.file_offset).add(segment.layer_offset).add(segment.bytes);
    hash.add(segment.cast ? static_cast<std::uint64_t>(*segment.cast) + 1 : 0);
  }
  for (const ExpectedDigest& each : layer.source.digests) hash.add(each.granule).add(each.digest);
  return hash.key();
}

}  // namespace warmserve
