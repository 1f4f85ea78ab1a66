// The order in which layers are evicted when memory is needed: lowest keep value first, then least
// recently used, then a model's last layers before its first.
//
// Each model keeps its own candidates in order, so that a choice examines the layers it takes and
// not all layers. The runtime's lock guards all calls.
#pragma once

#include <functional>
#include <vector>

#include "model/model.h"

namespace warmserve {

class EvictionOrder {
 public:
  // Models and layers that a choice must not evict.
  struct Spared {
    std::function<bool(const Model&)> whole_model;
    std::function<bool(const Layer&)> layer;
  };

  // Moves the layer to its place among the candidates, or removes it. Called after any change.
  static void update(Layer& layer);
  // Called after a use of the model, which becomes the last use of all its candidates.
  static void used(Model& model);

  // Returns layers whose eviction frees at least `granules`; none if there are not enough. Layers
  // of `first` precede all others. Held, busy and spared layers are never chosen. Adds the number
  // of layers examined to `examined`.
  static std::vector<Layer*> choose(const std::vector<Model*>& models, std::uint64_t granules,
                                    const Spared& spared, const Model* first,
                                    std::uint64_t* examined);
};

}  // namespace warmserve
