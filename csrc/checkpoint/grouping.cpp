#include "checkpoint/grouping.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>

#include "base/error.h"

namespace warmserve {
namespace {

constexpr std::size_t kNone = std::string_view::npos;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Returns the value of a part of one to nine digits, else kNone.
std::size_t number_of(std::string_view part) {
  if (part.empty() || part.size() > 9 || !std::all_of(part.begin(), part.end(), is_digit))
    return kNone;
  std::size_t value = 0;
  for (const char c : part) value = value * 10 + static_cast<std::size_t>(c - '0');
  return value;
}

// Calls visit(begin, part) for each part between dots until a call returns true; returns whether
// one did.
template <typename Visit>
bool any_part(std::string_view name, Visit visit) {
  std::size_t begin = 0;
  while (true) {
    const std::size_t end = std::min(name.find('.', begin), name.size());
    if (visit(begin, name.substr(begin, end - begin))) return true;
    if (end == name.size()) return false;
    begin = end + 1;
  }
}

// Returns the number of the one expert that the tensor belongs to, or kNone.
std::size_t expert_of(std::string_view name) {
  static constexpr std::string_view kExperts = ".experts.";
  for (std::size_t at = 0; (at = name.find(kExperts, at)) != kNone; ++at) {
    const std::size_t begin = at + kExperts.size(), end = name.find('.', begin);
    if (end == kNone) return kNone;
    if (const std::size_t number = number_of(name.substr(begin, end - begin)); number != kNone)
      return number;
  }
  return kNone;
}

// Returns whether the common families give this name to tensors that are used before the blocks.
bool is_embedding(std::string_view name) {
  for (std::size_t at = 0; (at = name.find("emb", at)) != kNone; ++at)
    if ((at == 0 || name[at - 1] == '.' || name[at - 1] == '_') &&
        !name.substr(at + 3).starts_with("ed_out"))
      return true;
  static constexpr std::string_view kProjector = "projector";
  const auto is_word = [](char c) {  // all non-ASCII characters count as letters
    return c == '_' || is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c < 0;
  };
  return any_part(name, [&](std::size_t, std::string_view part) {
    if (part == "wte" || part == "wpe" || part == "shared" || part == "project_in") return true;
    return part.ends_with(kProjector) && std::all_of(part.begin(), part.end(), is_word);
  });
}

std::size_t first_difference(std::string_view a, std::string_view b) {
  const std::size_t common = std::min(a.size(), b.size());
  std::size_t at = 0;
  for (; at + 8 <= common && std::memcmp(a.data() + at, b.data() + at, 8) == 0; at += 8) {
  }
  while (at < common && a[at] == b[at]) ++at;
  return at;
}

// Orders names as lists of parts: a dot sorts before every other character.
bool parts_before(std::string_view a, std::string_view b) {
  const std::size_t at = first_difference(a, b);
  const auto rank = [at](std::string_view name) {
    if (at == name.size()) return -2;
    return name[at] == '.' ? -1 : static_cast<int>(static_cast<unsigned char>(name[at]));
  };
  return rank(a) < rank(b);
}

bool begins_with_parts(std::string_view name, std::string_view parts) {
  return name.starts_with(parts) && (name.size() == parts.size() || name[parts.size()] == '.');
}

// Returns the longest common prefix that consists of whole parts.
std::string_view common_parts(std::string_view a, std::string_view b) {
  const std::size_t at = first_difference(a, b);
  const auto ends = [at](std::string_view name) { return at == name.size() || name[at] == '.'; };
  if (ends(a) && ends(b)) return a.substr(0, at);
  const std::size_t dot = at ? a.rfind('.', at - 1) : kNone;
  return dot == kNone ? std::string_view() : a.substr(0, dot);
}

struct Stack {
  std::string_view name;
  unsigned __int128 bytes = 0;
  std::uint32_t last_block = 0;
  std::uint32_t rank = 0;  // in execution order
};

// Finds the stack that shares the longest prefix with a name without a number.
class Owners {
 public:
  explicit Owners(const std::vector<Stack>& stacks) : stacks_(stacks), sorted_(stacks.size()) {
    std::iota(sorted_.begin(), sorted_.end(), 0);
    std::sort(sorted_.begin(), sorted_.end(), [&](std::uint32_t a, std::uint32_t b) {
      return parts_before(stacks_[a].name, stacks_[b].name);
    });
    // A tree of maxima: node i has the children 2 i and 2 i + 1, and the leaves are last.
    last_.resize(2 * sorted_.size());
    for (std::size_t i = sorted_.size(); i-- > 0;) last_[sorted_.size() + i] = sorted_[i];
    for (std::size_t i = sorted_.size(); i-- > 1;) last_[i] = later(last_[2 * i], last_[2 * i + 1]);
  }

  // Returns the stack's number; if several share that prefix, the one that executes last; `main` if
  // no stack shares a prefix.
  std::uint32_t of(std::string_view name, std::uint32_t main) const {
    const auto next = std::partition_point(
        sorted_.begin(), sorted_.end(),
        [&](std::uint32_t stack) { return parts_before(stacks_[stack].name, name); });
    std::string_view shared;
    if (next != sorted_.end()) shared = common_parts(name, stacks_[*next].name);
    if (next != sorted_.begin()) {
      const std::string_view other = common_parts(name, stacks_[*(next - 1)].name);
      if (other.size() > shared.size()) shared = other;
    }
    if (shared.empty()) return main;
    const auto begin = std::partition_point(
        sorted_.begin(), sorted_.end(),
        [&](std::uint32_t stack) { return parts_before(stacks_[stack].name, shared); });
    const auto end = std::partition_point(begin, sorted_.end(), [&](std::uint32_t stack) {
      return begins_with_parts(stacks_[stack].name, shared);
    });
    return last_between(static_cast<std::size_t>(begin - sorted_.begin()),
                        static_cast<std::size_t>(end - sorted_.begin()));
  }

 private:
  std::uint32_t later(std::uint32_t a, std::uint32_t b) const {
    return stacks_[a].rank > stacks_[b].rank ? a : b;
  }
  std::uint32_t last_between(std::size_t begin, std::size_t end) const {
    std::uint32_t found = sorted_[begin];
    for (begin += sorted_.size(), end += sorted_.size(); begin < end; begin /= 2, end /= 2) {
      if (begin % 2) found = later(found, last_[begin++]);
      if (end % 2) found = later(found, last_[--end]);
    }
    return found;
  }

  const std::vector<Stack>& stacks_;
  std::vector<std::uint32_t> sorted_, last_;
};

// A tensor's place in the order of execution. Sorted places form the layers. Fields are in the
// order of their significance.
struct Place {
  std::uint32_t rank = 0;  // of the stack; 0 for the embedding, the largest for the head
  std::uint32_t block = 0;
  std::uint32_t expert_plus_one = 0;
  bool loose = false;  // the name has no number
  std::uint32_t position = 0;
  std::uint32_t stack = 0;

  auto layer() const { return std::tuple(rank, block, expert_plus_one); }
  bool operator<(const Place& other) const {
    return std::tie(rank, block, expert_plus_one, loose, position) <
           std::tie(other.rank, other.block, other.expert_plus_one, other.loose, other.position);
  }
};

}  // namespace

Groups group_by_name(const TensorTable& table, bool experts) {
  std::vector<Stack> stacks;
  NameTable by_name;  // numbers as in `stacks`
  std::vector<Place> places(table.order.size());
  bool any_expert = false, any_loose = false;
  std::uint32_t latest = 0;  // neighbouring tensors often belong to one stack
  for (std::uint32_t position = 0; position < places.size(); ++position) {
    Place& place = places[position];
    place.position = position;
    const std::string_view name = table.names[table.order[position]];
    const bool numbered = any_part(name, [&](std::size_t begin, std::string_view part) {
      const std::size_t block = number_of(part);
      if (block == kNone) return false;
      place.block = static_cast<std::uint32_t>(block);
      const std::string_view stack = name.substr(0, begin ? begin - 1 : 0);
      if (stacks.empty() || stacks[latest].name != stack) {
        by_name.pending() += stack;
        const auto [number, is_new] = by_name.add_pending();
        if (is_new) stacks.push_back({.name = stack});
        latest = number;
      }
      return true;
    });
    place.loose = !numbered;
    any_loose |= place.loose;
    if (!numbered) continue;
    place.stack = latest;
    stacks[latest].bytes += table.tensors[table.order[position]].bytes;
    stacks[latest].last_block = std::max(stacks[latest].last_block, place.block);
    const std::size_t expert = experts ? expert_of(name) : kNone;
    if (expert != kNone) place.expert_plus_one = static_cast<std::uint32_t>(expert) + 1;
    any_expert |= expert != kNone;
  }
  if (experts && !any_expert)
    throw Error(ErrorKind::invalid_argument,
                "layers='experts': no tensor belongs to one expert alone (a name like "
                "'experts.0.w1.weight')");

  std::uint32_t main = 0;  // the stack with the most bytes; the first of several
  for (std::uint32_t i = 0; i < stacks.size(); ++i)
    if (stacks[i].bytes > stacks[main].bytes) main = i;
  const auto count = static_cast<std::uint32_t>(stacks.size());
  for (std::uint32_t i = 0; i < count; ++i) stacks[i].rank = i < main ? i + 1 : i;
  if (count) stacks[main].rank = count;
  const std::uint32_t head = count + 1;
  std::optional<Owners> owners;
  if (any_loose && count > 1) owners.emplace(stacks);
  for (Place& place : places) {
    if (!place.loose) {
      place.rank = stacks[place.stack].rank;
      continue;
    }
    const std::string_view name = table.names[table.order[place.position]];
    if (is_embedding(name)) continue;
    const std::uint32_t stack = owners ? owners->of(name, main) : main;
    place.rank = head;
    if (stack == main) continue;
    place.stack = stack;
    place.rank = stacks[stack].rank;
    place.block = stacks[stack].last_block;
  }
  if (!std::is_sorted(places.begin(), places.end())) std::sort(places.begin(), places.end());

  Groups groups;
  groups.of.resize(table.order.size());
  groups.members.reserve(places.size());
  for (std::size_t i = 0; i < places.size(); ++i) {
    const Place& place = places[i];
    if (i == 0 || place.layer() != places[i - 1].layer()) {
      std::string& name = groups.names.pending();
      if (place.rank == 0 || place.rank == head) {
        name += place.rank ? "head" : "embedding";
      } else {
        const std::string_view stack = stacks[place.stack].name;
        if (!stack.empty()) name.append(stack) += '.';
        name += std::to_string(place.block);
        if (place.expert_plus_one) name += ".experts." + std::to_string(place.expert_plus_one - 1);
      }
      groups.names.add_pending();
    }
    const std::uint32_t number = table.order[place.position];
    groups.of[number] = groups.names.size() - 1;
    groups.members.push_back(number);
  }
  return groups;
}

std::vector<bool> begin_with_stems(const std::vector<std::string_view>& names,
                                   const std::vector<std::string_view>& stems) {
  std::vector<std::uint32_t> sorted(names.size() + stems.size());
  std::iota(sorted.begin(), sorted.end(), 0);
  const auto text = [&](std::uint32_t i) {
    return i < names.size() ? names[i] : stems[i - names.size()];
  };
  std::sort(sorted.begin(), sorted.end(),
            [&](std::uint32_t a, std::uint32_t b) { return parts_before(text(a), text(b)); });
  // Names that begin with a stem directly follow it in this order, so one current stem suffices.
  std::vector<bool> found(names.size());
  std::optional<std::string_view> stem;
  for (const std::uint32_t i : sorted) {
    if (stem && begins_with_parts(text(i), *stem)) {
      if (i < names.size()) found[i] = text(i).size() > stem->size();
    } else if (i >= names.size()) {
      stem = text(i);
    }
  }
  return found;
}

}  // namespace warmserve
