#include "model/eviction_order.h"

#include <algorithm>
#include <tuple>

namespace warmserve {
namespace {

bool is_candidate(const Layer& layer) {
  return layer.granules_needed && layer.holds == 0 &&
         (layer.residency == Residency::resident || layer.unmap_failed);
}

// Iterates over one model's candidates in order by merging two ordered lists: the layers used since
// they were filled, and the others.
class Cursor {
 public:
  Cursor(Model& model, bool first)
      : model_(&model),
        first_(first),
        used_(model.candidates.used.begin()),
        fresh_(model.candidates.fresh.begin()) {
    find_next();
  }
  bool done() const { return !layer_; }
  Layer* layer() const { return layer_; }
  void advance() {
    ++(from_fresh_ ? fresh_ : used_);
    find_next();
  }
  bool operator<(const Cursor& other) const { return rank_ < other.rank_; }

 private:
  using Rank = std::tuple<bool, double, std::uint64_t, std::uint64_t, std::int64_t>;

  Rank rank(const CandidateKey& key) const {
    return {!first_ && key.whole, key.keep_value, std::max(key.filled_at, model_->last_use),
            model_->id, key.from_end};
  }
  void find_next() {
    const bool any_used = used_ != model_->candidates.used.end();
    const bool any_fresh = fresh_ != model_->candidates.fresh.end();
    layer_ = nullptr;
    if (!any_used && !any_fresh) return;
    from_fresh_ = !any_used || (any_fresh && rank(fresh_->first) < rank(used_->first));
    const auto& next = *(from_fresh_ ? fresh_ : used_);
    rank_ = rank(next.first);
    layer_ = next.second;
  }

  Model* model_;
  bool first_;
  std::map<CandidateKey, Layer*>::iterator used_, fresh_;
  bool from_fresh_ = false;
  Layer* layer_ = nullptr;
  Rank rank_;
};

}  // namespace

void EvictionOrder::update(Layer& layer) {
  Candidates& candidates = layer.model->candidates;
  if (layer.candidate)
    (layer.candidate->filled_at ? candidates.fresh : candidates.used).erase(*layer.candidate);
  layer.candidate.reset();
  if (!is_candidate(layer)) return;
  const bool fresh = layer.filled_at > layer.model->last_use;
  layer.candidate = CandidateKey{!layer.unmap_failed, layer.keep_value, fresh ? layer.filled_at : 0,
                                 -static_cast<std::int64_t>(layer.index)};
  (fresh ? candidates.fresh : candidates.used).emplace(*layer.candidate, &layer);
}

void EvictionOrder::used(Model& model) {
  while (!model.candidates.fresh.empty()) update(*model.candidates.fresh.begin()->second);
}

std::vector<Layer*> EvictionOrder::choose(const std::vector<Model*>& models, std::uint64_t granules,
                                          const Spared& spared, const Model* first,
                                          std::uint64_t* examined) {
  std::vector<Cursor> heap;
  for (Model* model : models) {
    if (model->whole_holds || spared.whole_model(*model)) continue;
    Cursor cursor(*model, model == first);
    if (!cursor.done()) heap.push_back(cursor);
  }
  const auto later = [](const Cursor& a, const Cursor& b) { return b < a; };
  std::make_heap(heap.begin(), heap.end(), later);
  std::vector<Layer*> victims;
  for (std::uint64_t found = 0; found < granules;) {
    if (heap.empty()) return {};
    std::pop_heap(heap.begin(), heap.end(), later);
    Cursor& cursor = heap.back();
    Layer* layer = cursor.layer();
    ++*examined;
    if (!layer->busy && !spared.layer(*layer)) {
      found += layer->granules_needed;
      victims.push_back(layer);
    }
    cursor.advance();
    if (cursor.done())
      heap.pop_back();
    else
      std::push_heap(heap.begin(), heap.end(), later);
  }
  return victims;
}

}  // namespace warmserve
