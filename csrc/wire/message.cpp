#include "wire/message.h"

#include <cstring>

#include "base/error.h"

namespace warmserve {
namespace {

[[noreturn]] void malformed() {
  throw Error(ErrorKind::general, "the other process sent a malformed message");
}

}  // namespace

void Writer::bytes(const void* data, std::size_t count) {
  const auto* from = static_cast<const std::byte*>(data);
  body_.insert(body_.end(), from, from + count);
}

Writer& Writer::number(std::uint64_t value) {
  bytes(&value, sizeof value);
  return *this;
}

Writer& Writer::real(double value) {
  bytes(&value, sizeof value);
  return *this;
}

Writer& Writer::text(std::string_view value) {
  number(value.size());
  bytes(value.data(), value.size());
  return *this;
}

Writer& Writer::numbers(const std::vector<std::uint32_t>& values) {
  number(values.size());
  bytes(values.data(), values.size() * sizeof(std::uint32_t));
  return *this;
}

void Reader::bytes(void* data, std::size_t count) {
  if (count > body_.size() - at_) malformed();
  if (count) std::memcpy(data, body_.data() + at_, count);
  at_ += count;
}

std::uint64_t Reader::number() {
  std::uint64_t value = 0;
  bytes(&value, sizeof value);
  return value;
}

std::uint32_t Reader::small_number() {
  const std::uint64_t value = number();
  if (value > UINT32_MAX) malformed();
  return static_cast<std::uint32_t>(value);
}

double Reader::real() {
  double value = 0;
  bytes(&value, sizeof value);
  return value;
}

std::size_t Reader::count(std::size_t least) {
  const std::uint64_t value = number();
  if (value > (body_.size() - at_) / least) malformed();
  return value;
}

std::string Reader::text() {
  std::string value(count(1), '\0');
  bytes(value.data(), value.size());
  return value;
}

std::vector<std::uint32_t> Reader::numbers() {
  std::vector<std::uint32_t> values(count(sizeof(std::uint32_t)));
  bytes(values.data(), values.size() * sizeof(std::uint32_t));
  return values;
}

void Reader::end() const {
  if (at_ != body_.size()) malformed();
}

}  // namespace warmserve
