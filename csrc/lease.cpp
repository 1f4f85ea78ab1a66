#include "lease.h"

#include <algorithm>
#include <map>
#include <set>

namespace warmserve {

bool LeaseDesk::fits(const Hold& hold) const {
  std::uint64_t granules = books_.held_granules;
  for (const ModelPtr& model : hold.models)
    if (model->holds == 0) granules += model->granules;
  return granules <= books_.arena.capacity();
}

// Whether the owner holds all of these models already: it takes nothing new, and making it wait
// for somebody who waits for its release would be a deadlock.
bool LeaseDesk::nested(const Hold& hold) const {
  return std::all_of(hold.models.begin(), hold.models.end(), [&](const ModelPtr& model) {
    return model->holds > 0 &&
           std::any_of(admitted_.begin(), admitted_.end(), [&](const Hold* other) {
             return other->owner == hold.owner &&
                    std::find(other->models.begin(), other->models.end(), model) !=
                        other->models.end();
           });
  });
}

void LeaseDesk::admit(const Lock& lock, const HoldPtr& hold) {
  for (const ModelPtr& model : hold->models) books_.hold(lock, *model);
  hold->admitted = true;
  hold->slot = admitted_.size();
  admitted_.push_back(hold.get());
}

bool LeaseDesk::try_admit(const Lock& lock, const HoldPtr& hold) {
  if (!(line_.empty() && fits(*hold)) && !nested(*hold)) return false;
  admit(lock, hold);
  return true;
}

void LeaseDesk::wait_in_line(const Lock& lock, const HoldPtr& hold) {
  std::uint64_t granules = 0;
  for (const ModelPtr& model : hold->models) granules += model->granules;
  const std::uint64_t bytes = granules * books_.arena.granule_bytes();
  if (granules > books_.arena.capacity())
    throw no_room(ErrorKind::out_of_device_memory, "lease", bytes, books_.arena.budget(),
                  books_.holders(lock));
  line_.push_back(hold);
  if (would_deadlock()) {
    line_.pop_back();
    const Error room =
        no_room(ErrorKind::busy, "lease", bytes, books_.arena.budget(), books_.holders(lock));
    throw Error(ErrorKind::busy,
                std::string(room.what()) + "; those who hold them would wait for this lease");
  }
}

HoldPtr LeaseDesk::admit_next(const Lock& lock) {
  if (line_.empty() || !fits(*line_.front())) return nullptr;
  HoldPtr hold = std::move(line_.front());
  line_.pop_front();
  admit(lock, hold);
  return hold;
}

std::vector<HoldPtr> LeaseDesk::turn_away(const Lock&, const ModelPtr& model) {
  std::vector<HoldPtr> out;
  for (const HoldPtr& hold : line_)
    if (std::find(hold->models.begin(), hold->models.end(), model) != hold->models.end())
      out.push_back(hold);
  for (const HoldPtr& hold : out) line_.remove(hold);
  return out;
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
  for (const ModelPtr& model : hold->models) books_.unhold(lock, *model);
}

// Plays the line to its end, as a banker would: owners who do not wait release all they hold; then
// the head of the line is served if it fits, releases too, and so on. A head that does not fit
// even so never will.
bool LeaseDesk::would_deadlock() const {
  std::map<std::uint64_t, std::uint32_t> waiting;  // owner, holds still in line
  for (const HoldPtr& hold : line_) ++waiting[hold->owner];
  std::vector<const Hold*> held(admitted_.begin(), admitted_.end());
  for (const HoldPtr& head : line_) {
    std::erase_if(held, [&](const Hold* hold) { return !waiting.contains(hold->owner); });
    std::set<const Model*> kept;
    for (const Hold* hold : held)
      for (const ModelPtr& model : hold->models) kept.insert(model.get());
    for (const ModelPtr& model : head->models) kept.insert(model.get());
    std::uint64_t granules = 0;
    for (const Model* model : kept) granules += model->granules;
    if (granules > books_.arena.capacity()) return true;
    if (--waiting[head->owner] == 0) waiting.erase(head->owner);
    held.push_back(head.get());
  }
  return false;
}

}  // namespace warmserve
