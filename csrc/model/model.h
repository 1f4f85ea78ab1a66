// What the runtime knows of a model: its layers, what stands behind them, who holds it.
#pragma once

#include <atomic>
#include <compare>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "memory/vmm.h"
#include "model/layer_set.h"
#include "model/source.h"

namespace warmserve {

// absent:   nothing behind its addresses (or poison).
// filling:  granules are being mapped and filled; owned by its Fill.
// resident: granules mapped, bytes complete.
// draining: on the way to absent; fences are waited for, then it is unmapped.
enum class Residency : std::uint8_t { absent, filling, resident, draining };
const char* to_string(Residency residency) noexcept;

struct Model;
struct Fill;
struct Layer;

// A layer's place among the candidates for eviction of its model; see EvictionOrder.
struct CandidateKey {
  bool whole;  // not torn
  double keep_value;
  std::uint64_t filled_at;  // 0: the model was used since
  std::int64_t from_end;
  auto operator<=>(const CandidateKey&) const = default;
};
struct Candidates {
  std::map<CandidateKey, Layer*> used, fresh;  // by whether the model was used since they came
};

// Under the runtime's lock, but for what is marked: `granules`, `mapping` and `poison` belong to
// the one thread that set `owned`, which uses them without the lock.
struct Layer {
  Model* model = nullptr;
  std::uint32_t index = 0;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;  // in the model's reservation
  std::uint64_t granules_needed = 0;
  LayerSource source;

  Residency residency = Residency::absent;
  bool owned = false;  // some thread works on it between two holds of the lock
  bool torn = false;   // its bytes are not the model's and unmapping failed: only draining is left
  std::uint32_t holds = 0;   // leases and passes on it that are not on the whole model
  std::uint32_t passes = 0;  // those of them that are passes
  double keep_value = 0;
  std::uint64_t filled_at = 0;            // the runtime's logical clock
  Fill* fill = nullptr;                   // the pending journey, if any
  std::optional<CandidateKey> candidate;  // where it is in the model's candidates, if it is

  std::vector<GranuleId> granules;  // owned
  std::optional<Mapping> mapping;   // owned
  std::optional<Mapping> poison;    // owned

  // It may not go. Leased: by a lease; else passes alone hold it, which began under one.
  inline bool held() const noexcept;
  inline bool leased() const noexcept;
};

// A position in a user's stream that ends its use of these layers; waited for before unmapping.
struct Use {
  std::shared_ptr<const Fence> fence;
  LayerSet layers;
};

struct Model {
  std::string name;
  const void* runtime = nullptr;  // whose it is; compared, never followed
  std::uint64_t id = 0;
  bool writable = false;
  std::vector<File> files;
  std::deque<Layer> layers;    // execution order; addresses stay
  std::uint64_t bytes = 0;     // of the layers, padding to granules not counted
  std::uint64_t granules = 0;  // of all layers; their bytes are at most kMostBytes
  ReservationPtr reservation;  // made at the first prewarm or view; set once, under the lock

  // Changes whenever the granules behind an address of the model do. Readable without the lock.
  std::atomic<std::uint64_t> backing_epoch{0};

  // Under the runtime's lock.
  bool registered = true;
  std::uint32_t leases = 0;         // on any of its layers
  std::uint64_t lease_epoch = 0;    // changes whenever one of them begins or ends
  std::uint32_t passes = 0;         // under way on any of its layers
  std::uint32_t whole_holds = 0;    // on all layers, which are not counted in each
  std::uint32_t whole_passes = 0;   // those of them that are passes
  std::uint32_t layers_held = 0;    // by the others
  std::uint64_t granules_held = 0;  // the same layers'
  std::uint32_t layers_leased = 0;  // by those of the others that are leases
  std::uint32_t missing = 0;        // layers that are not resident
  std::uint64_t last_use = 0;       // the runtime's logical clock
  std::vector<Use> uses;
  Candidates candidates;  // for eviction
};
using ModelPtr = std::shared_ptr<Model>;

bool Layer::held() const noexcept { return holds > 0 || model->whole_holds > 0; }
bool Layer::leased() const noexcept {
  return holds > passes || model->whole_holds > model->whole_passes;
}

// Some layers of a model; of a model alone, all of them.
struct Selection {
  Selection(ModelPtr of)
      : model(std::move(of)), layers(LayerSet::first(model->layers.size())), whole(true) {}
  Selection(ModelPtr of, LayerSet some)
      : model(std::move(of)), layers(std::move(some)), whole(layers.covers(model->layers.size())) {}

  template <typename Visit>
  void for_each(Visit visit) const {
    layers.for_each([&](std::uint32_t index) { visit(model->layers[index]); });
  }

  ModelPtr model;
  LayerSet layers;
  bool whole;
};

}  // namespace warmserve
