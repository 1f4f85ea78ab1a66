#include "checkpoint/name_table.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <random>
#include <utility>

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

// SipHash-1-3 with a random key per process, so that a file cannot be crafted to cause collisions.
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

}  // namespace

std::uint32_t NameTable::tag_of(std::string_view name) noexcept {
  return static_cast<std::uint32_t>(keyed_hash(name) >> 32);
}

std::size_t NameTable::slot_of(std::string_view name, std::uint32_t tag) const noexcept {
  const std::size_t mask = slots_.size() - 1;
  std::size_t at = home(tag);
  while (slots_[at].number_plus_one &&
         (slots_[at].tag != tag || (*this)[slots_[at].number_plus_one - 1] != name))
    at = (at + 1) & mask;
  return at;
}

std::optional<std::uint32_t> NameTable::find(std::string_view name) const noexcept {
  if (slots_.empty()) return std::nullopt;
  const Slot& slot = slots_[slot_of(name, tag_of(name))];
  if (!slot.number_plus_one) return std::nullopt;
  return slot.number_plus_one - 1;
}

std::pair<std::uint32_t, bool> NameTable::add_pending() {
  if ((size() + std::size_t{1}) * 4 > slots_.size() * 3) grow();
  const std::string_view name = pending_name();
  const std::uint32_t tag = tag_of(name);
  Slot& slot = slots_[slot_of(name, tag)];
  if (slot.number_plus_one) {
    drop_pending();
    return {slot.number_plus_one - 1, false};
  }
  names_.add_pending();
  slot = {tag, size()};
  return {size() - 1, true};
}

std::optional<std::uint32_t> NameTable::assign(StringList names) {
  names_ = std::move(names);
  resize(std::max(std::bit_ceil(size() + size() / 3 + std::size_t{1}), kFirstSlots));
  // Prefetches each name's slot while the names before it are added, because a table of millions of
  // slots does not fit in the CPU's cache.
  constexpr std::uint32_t kAhead = 16;
  std::array<std::uint32_t, kAhead> tags{};
  for (std::uint64_t next = 0; next < std::uint64_t{size()} + kAhead; ++next) {
    std::uint32_t& tag = tags[next % kAhead];
    if (next >= kAhead) {
      const auto number = static_cast<std::uint32_t>(next - kAhead);
      Slot& slot = slots_[slot_of(names_[number], tag)];
      if (slot.number_plus_one) return number;
      slot = {tag, number + 1};
    }
    if (next >= size()) continue;
    tag = tag_of(names_[static_cast<std::uint32_t>(next)]);
    __builtin_prefetch(&slots_[home(tag)], 1);
  }
  return std::nullopt;
}

void NameTable::resize(std::size_t slots) {
  slots_ = std::vector<Slot>(slots);
  shift_ = 32 - static_cast<unsigned>(std::countr_zero(slots));
}

void NameTable::grow() {
  const std::vector<Slot> before = std::move(slots_);
  resize(before.empty() ? kFirstSlots : before.size() * 2);
  const std::size_t mask = slots_.size() - 1;
  for (const Slot& slot : before) {
    if (!slot.number_plus_one) continue;
    std::size_t at = home(slot.tag);
    while (slots_[at].number_plus_one) at = (at + 1) & mask;
    slots_[at] = slot;
  }
}

}  // namespace warmserve
