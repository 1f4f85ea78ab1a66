// The order in which layers are evicted when room is needed: lowest keep value first, then least
// recently used, then the tail of a model before its head.
//
// Each model keeps its own candidates in order, so that a choice looks at those it takes and not at
// all layers there are. Everything under the runtime's lock.
#pragma once

#include <functional>
#include <vector>

#include "model/model.h"

namespace warmserve {

class EvictionOrder {
 public:
  // What a choice leaves alone.
  struct Spared {
    std::function<bool(const Model&)> whole_model;
    std::function<bool(const Layer&)> layer;
  };

  // Puts the layer where it belongs, or takes it out; to be called after any change to it.
  static void update(Layer& layer);
  // After a use of the model: all its candidates are as old as that.
  static void used(Model& model);

  // Layers so that `granules` come free; empty when there are not enough. Those of `first` go
  // before all others. What is held, owned or spared is not chosen. `examined` counts the layers
  // looked at.
  static std::vector<Layer*> choose(const std::vector<Model*>& models, std::uint64_t granules,
                                    const Spared& spared, const Model* first,
                                    std::uint64_t* examined);
};

}  // namespace warmserve
