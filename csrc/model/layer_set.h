// A set of one model's layers, by index. Any set is valid: native code never assumes a prefix.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

namespace warmserve {

class LayerSet {
 public:
  LayerSet() = default;
  static LayerSet first(std::size_t count) {
    LayerSet set;
    set.words_.assign(count / 64, ~std::uint64_t{0});
    if (count % 64) set.words_.push_back((std::uint64_t{1} << (count % 64)) - 1);
    return set;
  }

  void insert(std::uint32_t index) {
    if (index / 64 >= words_.size()) words_.resize(index / 64 + 1);
    words_[index / 64] |= std::uint64_t{1} << (index % 64);
  }
  void insert(const LayerSet& other) {
    if (other.words_.size() > words_.size()) words_.resize(other.words_.size());
    for (std::size_t i = 0; i < other.words_.size(); ++i) words_[i] |= other.words_[i];
  }
  void remove(const LayerSet& other) noexcept {
    for (std::size_t i = 0; i < words_.size() && i < other.words_.size(); ++i)
      words_[i] &= ~other.words_[i];
  }
  bool contains(std::uint32_t index) const noexcept {
    return index / 64 < words_.size() && (words_[index / 64] >> (index % 64) & 1);
  }
  bool contains(const LayerSet& other) const noexcept {
    for (std::size_t i = 0; i < other.words_.size(); ++i)
      if (other.words_[i] & ~(i < words_.size() ? words_[i] : 0)) return false;
    return true;
  }
  // Returns whether the set contains the first `count` layers.
  bool covers(std::size_t count) const noexcept {
    if (count == 0) return true;
    if (words_.size() < (count + 63) / 64) return false;
    for (std::size_t i = 0; i < count / 64; ++i)
      if (words_[i] != ~std::uint64_t{0}) return false;
    const std::uint64_t rest = (std::uint64_t{1} << (count % 64)) - 1;
    return (count % 64 == 0) || (words_[count / 64] & rest) == rest;
  }
  // Returns the layers that are in both sets.
  LayerSet common(const LayerSet& other) const {
    LayerSet both;
    both.words_.resize(std::min(words_.size(), other.words_.size()));
    for (std::size_t i = 0; i < both.words_.size(); ++i)
      both.words_[i] = words_[i] & other.words_[i];
    return both;
  }
  // Returns one more than the highest index in the set; 0 if it is empty.
  std::size_t end() const noexcept {
    std::size_t words = words_.size();
    while (words && !words_[words - 1]) --words;
    return words ? words * 64 - static_cast<std::size_t>(std::countl_zero(words_[words - 1])) : 0;
  }
  bool intersects(const LayerSet& other) const noexcept {
    for (std::size_t i = 0; i < words_.size() && i < other.words_.size(); ++i)
      if (words_[i] & other.words_[i]) return true;
    return false;
  }
  bool empty() const noexcept {
    for (const std::uint64_t word : words_)
      if (word) return false;
    return true;
  }
  // Calls visit(index) for each index, in ascending order.
  template <typename Visit>
  void for_each(Visit visit) const {
    for (std::size_t i = 0; i < words_.size(); ++i)
      for (std::uint64_t left = words_[i]; left; left &= left - 1)
        visit(static_cast<std::uint32_t>(i * 64 + static_cast<unsigned>(std::countr_zero(left))));
  }

 private:
  std::vector<std::uint64_t> words_;
};

}  // namespace warmserve
