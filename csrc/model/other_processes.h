// Interfaces to the other processes that share an arena: a broker owns it, and clients map layers
// of it. A runtime is one of the two, or neither.
#pragma once

#include <cstdint>
#include <span>

#include "base/error.h"
#include "base/types.h"
#include "model/layer_set.h"

namespace warmserve {

struct Layer;
struct Model;
class Lock;

// An eviction could not continue because a client still uses a layer. The client's use is a lease
// on the layer from then on, until the client says that it has ended.
class HeldByClient : public Error {
 public:
  explicit HeldByClient(const std::string& message) : Error(ErrorKind::busy, message) {}
};

// A broker's clients.
class Clients {
 public:
  virtual ~Clients() = default;
  // Makes every client unmap the layers. Afterwards no process but this one can read their
  // granules. Throws HeldByClient for the first layer that a client uses or does not give up in
  // time, or what poll throws. Called without the runtime's lock, for layers that are busy. Blocks.
  virtual void revoke(std::span<Layer* const> layers, const Poll& poll) = 0;

  // Returns whether a process may still map layers.
  virtual bool any_mapped() = 0;
  // After the end of the broker: ends the leases that stand for the clients' uses, so that the
  // runtime can close.
  virtual void end_holds_if_stopped() = 0;
};

// A client's demands on its broker for one ticket.
struct WantOptions {
  int priority = 0;
  bool lease = false;  // the broker holds the layers until all are mapped here
  Deadline deadline = kNever;
  double evict_below = 0;
  const Model* swapped_out = nullptr;
};

// A client's broker.
class Broker {
 public:
  virtual ~Broker() = default;
  // Asks for layers; returns the number of the request. The answers call Loader::arrive() or
  // Loader::refuse() for each layer. Throws general if the broker has ended. Wait-free.
  virtual std::uint64_t want(const Lock&, const Model& model, const LayerSet& layers,
                             const WantOptions& options) = 0;
  // Returns whether to ask later: the broker has ended, and another may take its place soon.
  virtual bool ask_later(const Lock&) = 0;
  // Says that a layer of a request is not wanted any more. The request is still answered for it.
  // Wait-free.
  virtual void cancel(const Lock&, std::uint64_t request, const Layer& layer) = 0;
  // Releases the granules of layers that were unmapped, and tells the broker. Called without the
  // runtime's lock, for layers that are busy.
  virtual void unmapped(std::span<Layer* const> layers) noexcept = 0;
  // Handles messages, for a runtime without threads. Blocks for at most kPollInterval. Returns
  // false if no broker can answer any more.
  virtual bool step() = 0;
  // Returns whether a thread handles the messages. If none does, waiters call step().
  virtual bool has_thread() const noexcept = 0;
};

}  // namespace warmserve
