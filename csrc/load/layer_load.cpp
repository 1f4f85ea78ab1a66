#include "load/layer_load.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace warmserve {

const TicketPtr& LayerLoad::most_urgent() const {
  const auto rank_of = [](const TicketPtr& ticket) {
    return Rank{ticket->priority, ticket->deadline, 0};
  };
  return *std::min_element(tickets.begin(), tickets.end(),
                           [&](const auto& a, const auto& b) { return rank_of(a) < rank_of(b); });
}

void LayerLoad::restart() {
  phase = Phase::queued;
  verdict = Verdict::wanted;
  begin = sent = done = 0;
  sums.clear();
  image.reset();
  cached = remembered = false;
  request = 0;
  request_leases = request_cancelled = false;
}

void LayerLoad::check() const {
  const auto require = [&](bool holds, const char* what) {
    if (!holds)
      throw Error(ErrorKind::general, "invariant broken: the load of layer " +
                                          std::to_string(layer->index) + " of '" + model->name +
                                          "' " + what);
  };
  require((to_host ? layer->host_load : layer->load) == this, "is not the load of its layer");
  require(begin <= span, "has handed out more bytes than the layer has");
  require(sent <= begin, "has sent more bytes than were handed out");
  // A copy may be seen to arrive before the thread that sent it counts it as sent.
  require(done <= (workers ? begin : sent), "has more bytes arrived than sent");
  require(image || !cached, "is said to be in the host cache but has no image");
  require(failed() ? in_flight <= begin : in_flight == begin - done,
          "counts the bytes in flight wrong");
  if (to_host) {
    require(phase == Phase::queued || image, "is loaded to the host cache without an image");
    require(phase != Phase::starting && phase != Phase::undoing && !cached,
            "is loaded to the host cache but uses granules");
    return;
  }
  switch (phase) {
    case Phase::queued:
      require(begin == 0 && idle(), "is queued but has handed out bytes");
      require(verdict == Verdict::wanted, "is queued but was abandoned");
      require(layer->residency != Residency::filling, "is queued but its layer is filling");
      break;
    case Phase::starting:
      require(begin == 0 && idle(), "is starting but has handed out bytes");
      require(layer->residency == Residency::filling && layer->busy,
              "is starting but its layer is not filling and busy");
      break;
    case Phase::copying:
      require(layer->residency == Residency::filling, "is copying but its layer is not filling");
      break;
    case Phase::arriving:
      require(sent == span, "is arriving but has not sent all bytes");
      require(layer->residency == Residency::filling, "is arriving but its layer is not filling");
      break;
    case Phase::undoing:
      require(idle(), "is undone while copies use its granules");
      // The layer may be absent: the wait for its fences failed, but it was not mapped yet.
      require(layer->residency == Residency::draining || layer->residency == Residency::absent,
              "is undone but its layer is not draining");
      break;
  }
}

}  // namespace warmserve
