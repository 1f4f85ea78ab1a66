#include "runtime/lease_queue.h"

#include <pthread.h>

#include <algorithm>
#include <map>

namespace warmserve {

std::uint64_t this_thread() noexcept { return static_cast<std::uint64_t>(pthread_self()); }

std::string lease_on(const std::vector<Selection>& wants) {
  std::string names;
  for (const Selection& wanted : wants)
    names += (names.empty() ? "'" : ", '") + wanted.model->name + "'";
  return "lease on " + names;
}

std::string why_busy(const Model& model) {
  return model.leases ? "'" + model.name + "' is leased"
                      : "a pass still computes with '" + model.name + "'";
}

bool LeaseDesk::fits(const Lock& lock, const Hold& hold) const {
  std::uint64_t granules = books_.held_granules;
  for (const Selection& wanted : hold.wants) granules += books_.granules_to_hold(lock, wanted);
  return granules <= books_.arena.capacity();
}

// Returns whether the owner already holds all layers of the hold. Such a hold takes nothing new,
// and if it waited in line behind an owner that waits for its release, both would wait for ever.
bool LeaseDesk::nested(const Hold& hold) const {
  return std::all_of(hold.wants.begin(), hold.wants.end(), [&](const Selection& wanted) {
    LayerSet own;
    for (const Hold* other : admitted_)
      if (other->owner == hold.owner)
        for (const Selection& held : other->wants)
          if (held.model == wanted.model) own.insert(held.layers);
    return own.contains(wanted.layers);
  });
}

void LeaseDesk::admit(const Lock& lock, const HoldPtr& hold) {
  for (const Selection& wanted : hold->wants) books_.hold(lock, wanted, hold->pass);
  hold->admitted = true;
  hold->slot = admitted_.size();
  admitted_.push_back(hold.get());
}

bool LeaseDesk::try_admit(const Lock& lock, const HoldPtr& hold) {
  if (!(line_.empty() && fits(lock, *hold)) && !nested(*hold)) return false;
  admit(lock, hold);
  return true;
}

void LeaseDesk::wait_in_line(const Lock& lock, const HoldPtr& hold) {
  std::uint64_t granules = 0;
  for (const Selection& wanted : hold->wants)
    wanted.for_each([&](const Layer& layer) { granules += layer.granules_needed; });
  const std::uint64_t bytes = granules * books_.arena.granule_bytes();
  if (granules > books_.arena.capacity())
    throw no_room(ErrorKind::out_of_device_memory, lease_on(hold->wants), bytes,
                  books_.arena.budget(), books_.holders(lock));
  line_.push_back(hold);
  if (would_deadlock()) {
    line_.pop_back();
    const Error room = no_room(ErrorKind::busy, lease_on(hold->wants), bytes, books_.arena.budget(),
                               books_.holders(lock));
    throw Error(ErrorKind::busy, std::string(room.what()) +
                                     "; the owners of the held layers would wait for this lease");
  }
}

HoldPtr LeaseDesk::begin_pass(const Lock& lock, const ModelPtr& model, std::uint64_t owner) {
  for (const HoldPtr& pass : passes_)
    if (pass->owner == owner && pass->wants.front().model == model) {
      ++pass->depth;
      return pass;
    }
  if (!model->leases) return nullptr;
  auto pass = std::make_shared<Hold>();
  if (model->whole_holds > model->whole_passes) {
    pass->wants.emplace_back(model);
  } else {
    LayerSet leased;
    for (const Layer& layer : model->layers)
      if (layer.leased()) leased.insert(layer.index);
    pass->wants.emplace_back(model, std::move(leased));
  }
  pass->owner = owner;
  pass->pass = true;
  pass->depth = 1;
  passes_.push_back(pass);
  admit(lock, pass);
  ++model->passes;
  return pass;
}

void LeaseDesk::extend(const Lock& lock, Hold& pass, const Layer& layer) {
  Selection& wanted = pass.wants.front();
  LayerSet added;
  added.insert(layer.index);
  Selection more(wanted.model, std::move(added));
  more.whole = false;  // counted per layer, like the selection that it is added to
  books_.hold(lock, more, true);
  wanted.layers.insert(layer.index);
}

bool LeaseDesk::in_pass(const Lock&, const Selection& selection, std::uint64_t owner) const {
  return std::any_of(passes_.begin(), passes_.end(), [&](const HoldPtr& pass) {
    const Selection& held = pass->wants.front();
    return pass->owner == owner && held.model == selection.model &&
           held.layers.intersects(selection.layers);
  });
}

HoldPtr LeaseDesk::admit_next(const Lock& lock) {
  if (line_.empty() || !fits(lock, *line_.front())) return nullptr;
  HoldPtr hold = std::move(line_.front());
  line_.pop_front();
  admit(lock, hold);
  return hold;
}

std::vector<HoldPtr> LeaseDesk::turn_away(const Lock&, const ModelPtr& model) {
  std::vector<HoldPtr> out;
  for (const HoldPtr& hold : line_)
    for (const Selection& wanted : hold->wants)
      if (wanted.model == model) out.push_back(hold);
  for (const HoldPtr& hold : out) line_.remove(hold);
  return out;
}

std::size_t LeaseDesk::ahead_of(const Lock&, const HoldPtr& hold) const {
  return static_cast<std::size_t>(
      std::distance(line_.begin(), std::find(line_.begin(), line_.end(), hold)));
}

void LeaseDesk::leave(const Lock& lock, const HoldPtr& hold) {
  if (!hold->admitted) {
    line_.remove(hold);
    return;
  }
  hold->admitted = false;
  admitted_[hold->slot] = admitted_.back();
  admitted_[hold->slot]->slot = hold->slot;
  admitted_.pop_back();
  for (const Selection& wanted : hold->wants) books_.unhold(lock, wanted, hold->pass);
  if (!hold->pass) return;
  --hold->wants.front().model->passes;
  std::erase(passes_, hold);
}

const Hold* LeaseDesk::failed(const Lock&, const Layer& layer) const {
  for (const Hold* hold : admitted_)
    if (hold->ticket && hold->ticket->error && hold->ticket->wants_layer(layer)) return hold;
  return nullptr;
}

// The safety check of Dijkstra's banker's algorithm, with the order of the line. Assumes that
// owners which do not wait release everything. Then each hold in line, from the head on, is
// admitted if it fits, and an owner releases everything once none of its holds waits. A head that
// does not fit even then can never be admitted.
bool LeaseDesk::would_deadlock() const {
  std::map<std::uint64_t, std::uint32_t> waiting;  // owner: number of its holds still in line
  for (const HoldPtr& hold : line_) ++waiting[hold->owner];
  std::vector<const Hold*> held(admitted_.begin(), admitted_.end());
  for (const HoldPtr& head : line_) {
    std::erase_if(held, [&](const Hold* hold) { return !waiting.contains(hold->owner); });
    std::map<const Model*, LayerSet> kept;
    const auto keep = [&](const Hold& hold) {
      for (const Selection& wanted : hold.wants) kept[wanted.model.get()].insert(wanted.layers);
    };
    for (const Hold* hold : held) keep(*hold);
    keep(*head);
    std::uint64_t granules = 0;
    for (const auto& [model, layers] : kept)
      layers.for_each(
          [&, &of = *model](std::uint32_t i) { granules += of.layers[i].granules_needed; });
    if (granules > books_.arena.capacity()) return true;
    if (--waiting[head->owner] == 0) waiting.erase(head->owner);
    held.push_back(head.get());
  }
  return false;
}

}  // namespace warmserve
