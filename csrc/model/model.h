// The runtime's record of a model: its layers, their memory, and the leases on them.
#pragma once

#include <atomic>
#include <compare>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "memory/contents.h"
#include "memory/vmm.h"
#include "model/layer_set.h"
#include "model/source.h"

namespace warmserve {

// absent:   no granules are mapped at the layer's addresses (or only the poison granule).
// filling:  granules are being mapped and filled; the layer belongs to its LayerLoad.
// resident: granules are mapped and all bytes are in place.
// draining: on the way to absent; the runtime waits for fences, then unmaps the layer.
enum class Residency : std::uint8_t { absent, filling, resident, draining };
const char* to_string(Residency residency) noexcept;

struct Model;
struct LayerLoad;
struct Layer;
struct HostImage;

// A layer's position among its model's candidates for eviction; see EvictionOrder.
struct CandidateKey {
  bool whole;  // false: unmapping it failed
  double keep_value;
  std::int64_t from_end;
  auto operator<=>(const CandidateKey&) const = default;
};

// The runtime's lock guards all fields except `granules`, `mapping` and `poison` of a busy layer:
// these belong to the thread that has set `busy`, which uses them without the lock.
struct Layer {
  Model* model = nullptr;
  std::uint32_t index = 0;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;  // in the model's reservation
  std::uint64_t granules_needed = 0;
  LayerSource source;
  ContentKey key;  // zero if the layer's bytes may change in place

  Residency residency = Residency::absent;
  bool busy = false;          // a thread works on the layer without the lock
  bool unmap_failed = false;  // its bytes are invalid too: it can only be drained again
  bool revoked = false;       // the broker wants it back: unmapped as soon as nothing holds it
  std::uint32_t holds = 0;    // leases and passes on it, except those on the whole model
  std::uint32_t passes = 0;   // the passes among `holds`
  double keep_value = 0;
  std::uint64_t filled_at = 0;            // the runtime's logical clock
  LayerLoad* load = nullptr;              // the pending load to the device, if any
  LayerLoad* host_load = nullptr;         // the pending load to the host cache, if any
  std::optional<CandidateKey> candidate;  // its key in the model's candidates, if it is one
  std::shared_ptr<HostImage> image;       // its bytes in the host cache; null: not cached

  std::vector<GranuleId> granules;
  std::optional<Mapping> mapping;
  std::optional<Mapping> poison;

  // Returns whether a lease or a pass holds the layer, so that it may not be evicted; and whether a
  // lease does. A pass may outlast the lease under which it began.
  inline bool held() const noexcept;
  inline bool leased() const noexcept;
};

// The position in a user's stream that ends its use of these layers. Unmapping waits for it.
struct Use {
  FencePtr fence;
  LayerSet layers;
};

struct Model {
  std::string name;
  const void* runtime = nullptr;  // its runtime; compared, never dereferenced
  std::uint64_t id = 0;
  // The model's number at the broker, in a client. 0: the broker does not have it.
  std::atomic<std::uint64_t> broker_id{0};
  bool writable = false;
  std::vector<File> files;
  std::deque<Layer> layers;    // in execution order; their addresses never change
  std::uint64_t bytes = 0;     // of the layers, without padding to granules
  std::uint64_t granules = 0;  // of all layers; their bytes are at most kMostBytes
  ReservationPtr reservation;  // created at the first prewarm or view; set once, under the lock
  std::atomic<bool> reserved{false};  // whether `reservation` is set; readable without the lock

  // Changes whenever the granules at an address of the model change. Readable without the lock.
  std::atomic<std::uint64_t> backing_epoch{0};

  // The runtime's lock guards all fields below.
  bool registered = true;
  std::uint32_t leases = 0;         // on any of its layers
  std::uint64_t lease_epoch = 0;    // changes whenever a lease on it begins or ends
  std::uint32_t passes = 0;         // running on any of its layers
  std::uint32_t whole_holds = 0;    // holds on the whole model; Layer::holds excludes them
  std::uint32_t whole_passes = 0;   // the passes among whole_holds
  std::uint32_t layers_held = 0;    // layers with Layer::holds
  std::uint64_t granules_held = 0;  // granules of those layers
  std::uint32_t layers_leased = 0;  // layers with a lease among Layer::holds
  std::uint32_t missing = 0;        // layers that are not resident
  std::uint32_t revoked = 0;        // layers with Layer::revoked
  std::uint64_t last_use = 0;       // the runtime's logical clock
  std::vector<Use> uses;
  std::map<CandidateKey, Layer*> candidates;  // for eviction, in order
};
using ModelPtr = std::shared_ptr<Model>;

bool Layer::held() const noexcept { return holds > 0 || model->whole_holds > 0; }
bool Layer::leased() const noexcept {
  return holds > passes || model->whole_holds > model->whole_passes;
}

// Some layers of a model; all of them if constructed from a model alone.
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
