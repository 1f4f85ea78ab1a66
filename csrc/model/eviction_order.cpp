#include "model/eviction_order.h"

#include <algorithm>
#include <tuple>

namespace warmserve {
namespace {

bool is_candidate(const Layer& layer) {
  return layer.granules_needed && layer.holds == 0 &&
         (layer.residency == Residency::resident || layer.unmap_failed);
}

// The candidates of one model that may be evicted, in order.
class Cursor {
 public:
  Cursor(Model& model, bool first, double below)
      : model_(&model), first_(first), below_(below), next_(model.candidates.begin()) {}
  bool done() const {
    if (next_ == model_->candidates.end()) return true;
    const CandidateKey& key = next_->first;
    return key.whole && !first_ && key.keep_value >= below_;
  }
  Layer* layer() const { return next_->second; }
  void advance() { ++next_; }
  bool operator<(const Cursor& other) const { return rank() < other.rank(); }

 private:
  std::tuple<bool, double, std::uint64_t, std::uint64_t> rank() const {
    const CandidateKey& key = next_->first;
    return {!first_ && key.whole, key.keep_value, std::max(layer()->filled_at, model_->last_use),
            model_->id};
  }

  Model* model_;
  bool first_;
  double below_;
  std::map<CandidateKey, Layer*>::iterator next_;
};

}  // namespace

void EvictionOrder::update(Layer& layer) {
  auto& candidates = layer.model->candidates;
  if (layer.candidate) candidates.erase(*layer.candidate);
  layer.candidate.reset();
  if (!is_candidate(layer)) return;
  layer.candidate =
      CandidateKey{!layer.unmap_failed, layer.keep_value, -static_cast<std::int64_t>(layer.index)};
  candidates.emplace(*layer.candidate, &layer);
}

std::vector<Layer*> EvictionOrder::choose(const std::vector<Model*>& models, std::uint64_t granules,
                                          const Spared& spared, const Model* first,
                                          std::uint64_t* examined) {
  std::vector<Cursor> heap;
  for (Model* model : models) {
    if (model->whole_holds || spared.whole_model(*model)) continue;
    Cursor cursor(*model, model == first, spared.keep_value);
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
