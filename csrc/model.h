// What the runtime knows of a model: its layers, what stands behind them, who holds it.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "source.h"
#include "vmm.h"

namespace warmserve {

// absent:   nothing behind its addresses (or poison).
// filling:  granules are being mapped and filled; owned by its Fill.
// resident: granules mapped, bytes complete.
// draining: on the way to absent; fences are waited for, then it is unmapped.
enum class Residency : std::uint8_t { absent, filling, resident, draining };
const char* to_string(Residency residency) noexcept;

struct Model;
struct Fill;

// Under the runtime's lock, but for what is marked: `granules`, `mapping` and `poison` belong to
// the one thread that set `owned`, which uses them without the lock.
struct Layer {
  Model* model = nullptr;
  std::uint32_t index = 0;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;  // in the model's reservation
  std::uint32_t granules_needed = 0;
  LayerSource source;

  Residency residency = Residency::absent;
  bool owned = false;  // some thread works on it between two holds of the lock
  bool torn = false;   // its bytes are not the model's and unmapping failed: only draining is left
  double keep_value = 0;
  std::uint64_t filled_at = 0;  // the runtime's logical clock
  Fill* fill = nullptr;         // the pending journey, if any

  std::vector<GranuleId> granules;  // owned
  std::optional<Mapping> mapping;   // owned
  std::optional<Mapping> poison;    // owned
};

struct Model {
  std::string name;
  const void* runtime = nullptr;  // whose it is; compared, never followed
  std::uint64_t id = 0;
  bool writable = false;
  std::vector<File> files;
  std::deque<Layer> layers;    // execution order; addresses stay
  std::uint64_t bytes = 0;     // of the layers, padding to granules not counted
  std::uint32_t granules = 0;  // of all layers
  ReservationPtr reservation;  // made at the first prewarm or view; set once, under the lock

  // Changes whenever the granules behind an address of the model do. Readable without the lock.
  std::atomic<std::uint64_t> backing_epoch{0};

  // Under the runtime's lock.
  bool registered = true;
  std::uint32_t holds = 0;     // leases held or being loaded: none of its layers may go
  std::uint32_t missing = 0;   // layers that are not resident
  std::uint64_t last_use = 0;  // the runtime's logical clock
  // Positions in users' streams that end their use of the model; waited for before unmapping.
  std::vector<std::shared_ptr<const Fence>> fences;
};
using ModelPtr = std::shared_ptr<Model>;

}  // namespace warmserve
