// The load of one layer to the device, or to the host cache: its rank, its phase and its counts of
// bytes.
//
// README.md beside this file has the life of a layer: one table and a diagram.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "load/ticket.h"
#include "model/host_cache.h"

namespace warmserve {

struct Rank {
  int priority;
  Deadline deadline;
  std::uint64_t sequence;

  bool more_urgent_than(const Rank& other) const noexcept {
    return priority != other.priority ? priority > other.priority : deadline < other.deadline;
  }
  bool operator<(const Rank& other) const noexcept {
    return more_urgent_than(other) || (!other.more_urgent_than(*this) && sequence < other.sequence);
  }
};

// Used under the runtime's lock. LoadQueue::relist() must be called before the lock is released by
// each function that changes a field that next() depends on.
struct LayerLoad {
  enum class Phase {
    queued,    // has no granules
    starting,  // a loader thread makes room and takes granules
    copying,   // chunks are handed out
    arriving,  // all bytes are sent and the granules are mapped; the last copies may be in flight;
               // to the host cache: all bytes are read
    undoing,   // a loader thread unmaps the layer and frees its granules
  };
  enum class Verdict {
    wanted,     // continue, unless no ticket wants it
    preempted,  // a load of higher priority needs its granules: undo, and start again later
    failed,     // its bytes must not be used: undo; start again if a ticket still wants it
  };
  enum class Next { start, copy, undo, none };  // the next step that a loader thread can do

  Layer* layer;
  ModelPtr model;      // keeps the layer alive
  std::uint64_t span;  // bytes to write: whole granules, to overwrite all bytes of earlier tenants
  Rank rank;
  bool to_host = false;  // to the host cache: without granules, and the layer stays as it is
  std::vector<TicketPtr> tickets{};  // empty: the load is unwanted
  unsigned generation = 0;           // incremented when the first ticket joins an unwanted load
  Phase phase = Phase::queued;
  Verdict verdict = Verdict::wanted;
  std::uint64_t begin = 0;            // first byte not handed to a loader thread
  std::uint64_t sent = 0;             // bytes whose copies are enqueued or complete
  std::uint64_t done = 0;             // bytes arrived
  std::uint64_t in_flight = 0;        // bytes handed to loader threads that have not arrived
  unsigned workers = 0;               // loader threads that work on a chunk of the load
  std::vector<std::uint64_t> sums{};  // of the layer's digests, over the bytes sent; see digests.h
  HostImagePtr image{};               // host memory that the copies read; null: staging chunks
  bool cached = false;                // the image has the bytes already: no file is read
  bool remembered = false;            // its granules contained the layer already
  std::uint64_t request = 0;          // of a client: its request to the broker while `starting`
  bool request_leases = false;        // the request is for a lease
  bool request_cancelled = false;     // the broker was told that the layer is unwanted
  Next listed = Next::none;           // the list of LoadQueue that contains the load

  // Returns the ticket of the highest rank. Precondition: `tickets` is not empty.
  const TicketPtr& most_urgent() const;
  bool foreground() const noexcept { return rank.priority > kBackground; }
  bool failed() const noexcept { return verdict == Verdict::failed; }
  bool unwanted() const noexcept { return verdict != Verdict::wanted || tickets.empty(); }
  bool idle() const noexcept { return in_flight == 0 && workers == 0; }
  // Returns whether the layer has all its bytes at its addresses.
  bool complete() const noexcept {
    return phase == Phase::arriving && done == span && idle() && !failed();
  }
  Next next() const noexcept {
    if (phase == Phase::queued) return Next::start;
    if (phase == Phase::starting && request && tickets.empty() && !request_cancelled)
      return Next::undo;
    if (phase != Phase::copying && phase != Phase::arriving) return Next::none;
    if (unwanted()) return Next::undo;
    return begin < span ? Next::copy : Next::none;
  }

  // Records why the load is to be undone. A load that has failed stays failed.
  void abandon(Verdict why) noexcept { verdict = std::max(verdict, why); }
  // Queues an undone load again. Precondition: idle().
  void restart();
  // Throws general, with a sentence, if the fields contradict each other or the layer.
  void check() const;
};

}  // namespace warmserve
