#include "name_table.h"

#include <bit>
#include <cstring>
#include <random>

namespace warmserve {
namespace {

struct Key {
  std::uint64_t low, high;
};

Key process_key() {
  std::random_device device;
  const auto word = [&] { return (static_cast<std::uint64_t>(device()) << 32) | device(); };
  return {word(), word()};
}

struct Sip {
  std::uint64_t a, b, c, d;

  void round() noexcept {
    a += b;
    b = std::rotl(b, 13) ^ a;
    a = std::rotl(a, 32);
    c += d;
    d = std::rotl(d, 16) ^ c;
    a += d;
    d = std::rotl(d, 21) ^ a;
    c += b;
    b = std::rotl(b, 17) ^ c;
    c = std::rotl(c, 32);
  }
  void take(std::uint64_t word) noexcept {
    d ^= word;
    round();
    a ^= word;
  }
};

}  // namespace

std::uint64_t keyed_hash(std::string_view text) noexcept {
  static const Key key = process_key();
  Sip state{key.low ^ 0x736f6d6570736575, key.high ^ 0x646f72616e646f6d,
            key.low ^ 0x6c7967656e657261, key.high ^ 0x7465646279746573};
  std::size_t at = 0;
  std::uint64_t word = 0;
  for (; at + sizeof word <= text.size(); at += sizeof word) {
    std::memcpy(&word, text.data() + at, sizeof word);
    state.take(word);
  }
  word = 0;
  std::memcpy(&word, text.data() + at, text.size() - at);
  state.take(word | (static_cast<std::uint64_t>(text.size()) << 56));
  state.c ^= 0xff;
  for (int i = 0; i < 3; ++i) state.round();
  return state.a ^ state.b ^ state.c ^ state.d;
}

std::size_t NameTable::slot_of(std::string_view name, std::uint64_t hash) const noexcept {
  const std::size_t mask = slots_.size() - 1;
  const auto tag = static_cast<std::uint32_t>(hash >> 32);
  std::size_t at = hash & mask;
  while (slots_[at].number_plus_one &&
         (slots_[at].tag != tag || (*this)[slots_[at].number_plus_one - 1] != name))
    at = (at + 1) & mask;
  return at;
}

std::optional<std::uint32_t> NameTable::find(std::string_view name) const noexcept {
  if (slots_.empty()) return std::nullopt;
  const Slot& slot = slots_[slot_of(name, keyed_hash(name))];
  if (!slot.number_plus_one) return std::nullopt;
  return slot.number_plus_one - 1;
}

std::pair<std::uint32_t, bool> NameTable::add_pending() {
  if ((size() + std::size_t{1}) * 4 > slots_.size() * 3) grow();
  const std::string_view name = pending_name();
  const std::uint64_t hash = keyed_hash(name);
  Slot& slot = slots_[slot_of(name, hash)];
  if (slot.number_plus_one) {
    drop_pending();
    return {slot.number_plus_one - 1, false};
  }
  names_.add_pending();
  slot = {static_cast<std::uint32_t>(hash >> 32), size()};
  return {size() - 1, true};
}

void NameTable::grow() {
  std::vector<Slot>(slots_.empty() ? 16 : slots_.size() * 2).swap(slots_);
  for (std::uint32_t number = 0; number < size(); ++number) {
    const std::string_view name = (*this)[number];
    const std::uint64_t hash = keyed_hash(name);
    slots_[slot_of(name, hash)] = {static_cast<std::uint32_t>(hash >> 32), number + 1};
  }
}

}  // namespace warmserve
