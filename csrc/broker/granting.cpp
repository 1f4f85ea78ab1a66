// Giving clients the layers that they want.
#include <sys/stat.h>

#include <cerrno>
#include <iterator>
#include <utility>

#include "base/os_failure.h"
#include "broker/server.h"

namespace warmserve {
namespace {

// How long a lease that could wait for ever is tried again. It is longer than clients take to give
// layers up that nothing uses any more.
constexpr std::chrono::milliseconds kRefusedFor{500};

}  // namespace

// Begins or queues the lease of a request. If the queue finds that it could wait for ever, it is
// tried again for a while: layers that count as used by the client may be on their way back.
void BrokerServer::begin_lease(Client& client, Pending& pending) {
  try {
    pending.lease =
        runtime_.begin_lease({Selection(pending.wanted.model, pending.left)}, client.id);
    pending.refused_since = {};
  } catch (const Error& error) {
    const Deadline now = Clock::now();
    if (pending.refused_since == Deadline()) pending.refused_since = now;
    if (error.kind() == ErrorKind::busy && now - pending.refused_since < kRefusedFor) return;
    fail(client, pending, std::current_exception());
  }
}

// Sends a client the wanted layers that are resident now, and ends its requests that are complete
// or have failed.
void BrokerServer::advance(Client& client) {
  for (auto pending = client.pending.begin(); pending != client.pending.end();) {
    if (!pending->lease && !pending->ticket && !pending->left.empty())
      begin_lease(client, *pending);
    if (!pending->lease && !pending->ticket) {
      pending = pending->left.empty() ? client.pending.erase(pending) : std::next(pending);
      continue;
    }
    // Read before the layers: once a request is done, it has all its layers or never will.
    const bool done = pending->ticket && runtime_.done(pending->ticket);
    const std::exception_ptr failure = pending->lease ? runtime_.failure(pending->lease)
                                       : done         ? runtime_.failure(pending->ticket)
                                                      : nullptr;
    const ModelPtr model = pending->wanted.model;
    // An earlier request may have brought some of them.
    pending->left.remove(client.mapped[model->id]);
    // A lease that waits gets nothing: what its client maps and leases already could keep another
    // lease waiting, and this one behind it.
    const bool admitted = pending->ticket || runtime_.ready(pending->lease, false);
    const std::vector<Runtime::Granted> granted =
        admitted ? runtime_.granted(Selection(model, pending->left))
                 : std::vector<Runtime::Granted>();
    for (const Runtime::Granted& layer : granted) {
      LayerSet one;
      one.insert(layer.layer);
      add_mapped(client, *model, layer.layer, layer.granules);
      pending->left.remove(one);
    }
    if (client.mapped[model->id].empty()) client.mapped.erase(model->id);
    // The client may use the layers as soon as it reads this, so nothing here may hold them then.
    if (pending->left.empty() || done || failure) end_pending(*pending);
    if (!granted.empty()) send_granted(client, *model, granted);
    if (!pending->left.empty() && (done || failure))
      fail(client, *pending,
           failure ? failure
                   : std::make_exception_ptr(Error(
                         ErrorKind::busy,
                         "'" + model->name + "' was evicted again before it could be mapped")));
    pending = pending->left.empty() ? client.pending.erase(pending) : std::next(pending);
  }
}

void BrokerServer::send_granted(Client& client, const Model& model,
                                const std::vector<Runtime::Granted>& granted) {
  struct Run {
    Place place;
    std::uint64_t count;
  };
  Writer writer;
  writer.number(model.id).number(granted.size());
  for (const auto& [index, granules] : granted) {
    std::vector<Run> runs;
    for (const GranuleId id : granules) {
      const Place place = place_of(id);
      if (client.memory.insert(place.memory).second) send_memory(client, place.memory);
      if (!runs.empty() && runs.back().place.memory == place.memory &&
          runs.back().place.offset + runs.back().count * granule_bytes_ == place.offset)
        ++runs.back().count;
      else
        runs.push_back({place, 1});
    }
    writer.number(index).number(runs.size());
    for (const Run& run : runs)
      writer.number(run.place.memory).number(run.place.offset).number(run.count);
  }
  send(client, {.op = Op::map, .body = writer.take()});
}

void BrokerServer::send_memory(Client& client, std::uint64_t number) {
  Message message{.op = Op::memory, .body = Writer().number(number).take()};
  for (const auto& [file, memory] : memories_)
    if (memory.number == number)
      message.descriptors.push_back(duplicated(memory.descriptor.get(), "the arena's memory"));
  send(client, std::move(message));
}

// Returns where the granule lies. A granule keeps its place, because a served arena is not trimmed.
BrokerServer::Place BrokerServer::place_of(GranuleId id) {
  if (const auto known = places_.find(id); known != places_.end()) return known->second;
  const ExportedGranule exported = runtime_.exported(id);
  const SharedGranule& shared = exported.shared();
  struct stat status{};
  if (::fstat(shared.descriptor, &status) != 0)
    throw Error(ErrorKind::general, os_failure("fstat of the arena's memory", errno));
  const std::pair file(static_cast<std::uint64_t>(status.st_dev),
                       static_cast<std::uint64_t>(status.st_ino));
  auto memory = memories_.find(file);
  if (memory == memories_.end())
    memory = memories_
                 .emplace(file, Memory{duplicated(shared.descriptor, "the arena's memory"),
                                       memories_.size() + 1})
                 .first;
  return places_[id] = {memory->second.number, shared.offset};
}

}  // namespace warmserve
