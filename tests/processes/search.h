// A search of all states of a model, breadth first, so that the trace to a state is a shortest one.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "lease_model.h"
#include "lease_setup.h"
#include "lease_state.h"

// States by number, in order of discovery, with a hash table of their numbers.
class States {
 public:
  std::uint32_t size() const { return static_cast<std::uint32_t>(states_.size()); }
  const State& operator[](std::uint32_t number) const { return states_[number]; }

  // Returns the state's number, and whether it is new.
  std::pair<std::uint32_t, bool> add(const State& state) {
    if (states_.size() * 2 >= table_.size()) grow();
    std::uint32_t& place = table_[place_of(state)];
    if (place != kFree) return {place, false};
    place = size();
    states_.push_back(state);
    return {place, true};
  }

 private:
  static constexpr std::uint32_t kFree = ~0u;
  using Key = std::array<std::uint64_t, 2>;

  std::size_t place_of(const State& state) const {
    const auto key = std::bit_cast<Key>(state);
    std::uint64_t hash = key[0] * 0x9e3779b97f4a7c15u ^ std::rotl(key[1] * 0xc2b2ae3d27d4eb4fu, 31);
    hash = (hash ^ hash >> 32) * 0x9e3779b97f4a7c15u;
    std::size_t place = hash >> 32 & (table_.size() - 1);
    while (table_[place] != kFree && std::bit_cast<Key>(states_[table_[place]]) != key)
      place = (place + 1) & (table_.size() - 1);
    return place;
  }

  void grow() {
    table_.assign(table_.size() * 4, kFree);
    for (std::uint32_t number = 0; number < size(); ++number)
      table_[place_of(states_[number])] = number;
  }

  std::vector<State> states_;
  std::vector<std::uint32_t> table_ = std::vector<std::uint32_t>(1 << 12, kFree);
};

struct Finding {
  Verdict verdict;
  std::size_t states;
  std::vector<Step> trace;  // to a state with this verdict
};

class Search {
 public:
  // Looks for states with this verdict or, if it is `holds`, with any other one.
  Search(const Setup& setup, Verdict sought) : setup_(setup), sought_(sought), model_(setup) {}

  Finding run() {
    reach(model_.start(), 0);
    for (std::uint32_t number = 0; number < states_.size(); ++number)
      if (const auto finding = expand(number)) return *finding;
    if (const auto circling = find_circle()) return found(Verdict::stuck, *circling);
    return {Verdict::holds, states_.size(), {}};
  }

 private:
  bool seeks(Verdict verdict) const { return sought_ == verdict || sought_ == Verdict::holds; }

  State canonical(const State& state) const {
    return ::canonical(state, setup_.clients, setup_.threads);
  }

  std::pair<std::uint32_t, bool> reach(const State& state, std::uint32_t from) {
    const auto reached = states_.add(canonical(state));
    if (reached.second) from_.push_back(from);
    return reached;
  }

  std::optional<Finding> expand(std::uint32_t number) {
    const State state = states_[number];
    std::uint32_t owed = number;
    for (const Step& step : model_.steps(state)) {
      const auto [next, is_new] = reach(step.to, number);
      if (step.owed) owed = next;
      if (!is_new) continue;
      for (Verdict verdict : {Verdict::bad_lease, Verdict::bad_mapping, Verdict::torn})
        if (seeks(verdict) && has(step.to, verdict)) return found(verdict, next);
    }
    owed_.push_back(owed);
    if (owed != number || at_rest(state) || !seeks(Verdict::stuck)) return {};
    return found(Verdict::stuck, number);
  }

  // Returns a state from which the owed steps run in a circle. One owed step of each state is
  // followed. If there is no circle, they end, and they end at rest, as `expand` has checked.
  std::optional<std::uint32_t> find_circle() const {
    enum Mark : char { unknown, on_this_way, ends };
    std::vector<Mark> marks(states_.size(), unknown);
    for (std::uint32_t first = 0; first < states_.size(); ++first) {
      std::uint32_t last = first;
      for (; marks[last] == unknown && owed_[last] != last; last = owed_[last])
        marks[last] = on_this_way;
      if (marks[last] == on_this_way) return last;
      marks[last] = ends;
      for (std::uint32_t at = first; at != last; at = owed_[at]) marks[at] = ends;
    }
    return {};
  }

  // Takes the steps to a state again, so that clients and threads keep their numbers from the start
  // on, which `canonical` swaps.
  Finding found(Verdict verdict, std::uint32_t number) {
    std::vector<std::uint32_t> way;
    for (; number; number = from_[number]) way.push_back(number);
    Finding finding{verdict, states_.size(), {}};
    State state = model_.start();
    for (; !way.empty(); way.pop_back()) {
      for (const Step& step : model_.steps(state)) {
        if (states_.add(canonical(step.to)).first != way.back()) continue;
        finding.trace.push_back(step);
        break;
      }
      state = finding.trace.back().to;
    }
    return finding;
  }

  const Setup setup_;
  const Verdict sought_;
  Model model_;
  States states_;
  std::vector<std::uint32_t> from_;  // the state from which each was reached first
  std::vector<std::uint32_t> owed_;  // the state behind an owed step of each; itself without one
};
