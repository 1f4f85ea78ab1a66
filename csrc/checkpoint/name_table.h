// A compact set of many strings, numbered in the order of addition: number to string and back. Each
// string takes its bytes, an end and a slot.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace warmserve {

// Strings stored one after another in one allocation.
class StringList {
 public:
  std::uint32_t size() const noexcept { return static_cast<std::uint32_t>(ends_.size()); }
  std::string_view operator[](std::uint32_t number) const noexcept {
    return view(number ? ends_[number - 1] : 0, ends_[number]);
  }

  // Append the next string to pending(), then add or drop it.
  std::string& pending() noexcept { return bytes_; }
  std::string_view pending_string() const noexcept { return view(last(), bytes_.size()); }
  void add_pending() { ends_.push_back(bytes_.size()); }
  void drop_pending() { bytes_.resize(last()); }
  void add(std::string_view string) {
    bytes_ += string;
    add_pending();
  }

 private:
  std::uint64_t last() const noexcept { return ends_.empty() ? 0 : ends_.back(); }
  std::string_view view(std::uint64_t begin, std::uint64_t end) const noexcept {
    return std::string_view(bytes_).substr(begin, end - begin);
  }

  std::string bytes_;
  std::vector<std::uint64_t> ends_;
};

class NameTable {
 public:
  std::uint32_t size() const noexcept { return names_.size(); }
  std::string_view operator[](std::uint32_t number) const noexcept { return names_[number]; }
  std::optional<std::uint32_t> find(std::string_view name) const noexcept;

  // Append a new name to pending(), then call add_pending(). It returns the name's number and true;
  // or, if the table has an equal name, that name's number and false, and adds nothing.
  std::string& pending() noexcept { return names_.pending(); }
  std::string_view pending_name() const noexcept { return names_.pending_string(); }
  std::pair<std::uint32_t, bool> add_pending();
  void drop_pending() { names_.drop_pending(); }

  // Takes all names at once, which is several times faster for millions of names. If a name equals
  // an earlier one, returns its number; the table is then unusable.
  std::optional<std::uint32_t> assign(StringList names);

 private:
  struct Slot {
    std::uint32_t tag = 0;              // 32 bits of the name's hash
    std::uint32_t number_plus_one = 0;  // 0: empty
  };
  static constexpr std::size_t kFirstSlots = 16;

  static std::uint32_t tag_of(std::string_view name) noexcept;
  // Returns the slot where the search for a tag begins: the tag's leading bits. The order of the
  // slots therefore survives doubling, and grow() refills them in order without reading the names.
  std::size_t home(std::uint32_t tag) const noexcept { return tag >> shift_; }
  std::size_t slot_of(std::string_view name, std::uint32_t tag) const noexcept;
  void resize(std::size_t slots);
  void grow();

  StringList names_;
  std::vector<Slot> slots_;  // a power of two slots, or none
  unsigned shift_ = 32;      // 32 minus log2 of the number of slots
};

}  // namespace warmserve
