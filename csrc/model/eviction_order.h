// The order in which layers are evicted when memory is needed.
//
// Each model offers its layer with the lowest keep value, and the last among equals, so that it
// keeps its leading layers. Among the layers offered, the one with the lowest keep value is
// evicted, and among equals the one that was used or filled least recently.
//
// A model keeps its candidates in order, so that a choice examines the layers it takes and not all
// layers. The runtime's lock guards all calls.
#pragma once

#include <functional>
#include <limits>
#include <vector>

#include "model/model.h"

namespace warmserve {

class EvictionOrder {
 public:
  // Models and layers that a choice must not evict.
  struct Spared {
    std::function<bool(const Model&)> whole_model;
    std::function<bool(const Layer&)> layer;
    double keep_value = std::numeric_limits<double>::infinity();  // layers of at least this value
  };

  // Moves the layer to its place among the candidates, or removes it. Called after any change.
  static void update(Layer& layer);

  // Returns layers whose eviction frees at least `granules`; none if there are not enough. Layers
  // of `first` precede all others, whatever their keep value. Held, busy and spared layers are
  // never chosen. Adds the number of layers examined to `examined`.
  static std::vector<Layer*> choose(const std::vector<Model*>& models, std::uint64_t granules,
                                    const Spared& spared, const Model* first,
                                    std::uint64_t* examined);
};

}  // namespace warmserve
