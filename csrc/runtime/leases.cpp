// The runtime's operations on leases and passes: begin, share, wait, record, end.
#include <algorithm>
#include <utility>

#include "runtime/runtime.h"

namespace warmserve {

namespace {

// Completed uses. Destroy them without the lock: dropping the last reference to a stream may block.
using Fences = std::vector<std::shared_ptr<const Fence>>;

void add_use(const Lock&, const Selection& used, const std::shared_ptr<const Fence>& fence,
             Fences* past) {
  std::vector<Use>& uses = used.model->uses;
  if (uses.size() >= 8)  // keeps the list about as long as the number of pending uses
    std::erase_if(uses, [&](const Use& use) {
      const bool complete = use.fence->complete();
      if (complete) past->push_back(use.fence);
      return complete;
    });
  uses.push_back({fence, used.layers});
}

}  // namespace

// Requests the layers that an admitted hold is missing.
void Runtime::serve(const Lock& lock, const HoldPtr& hold) {
  if (hold->entry) hold->entry->finish(books_, lock);
  const bool missing = std::any_of(hold->wants.begin(), hold->wants.end(), [](const auto& wanted) {
    bool found = false;
    if (wanted.model->missing)
      wanted.for_each([&](const Layer& l) { found |= l.residency != Residency::resident; });
    return found;
  });
  if (!missing) return;
  hold->ticket = std::make_shared<Ticket>(lease_on(hold->wants), kForeground, hold->wants);
  transfer_.request(lock, hold->ticket);
}

HoldPtr Runtime::begin_lease(std::vector<Selection> wants, std::uint64_t owner) {
  for (const Selection& wanted : wants) reservation(wanted.model);
  auto hold = std::make_shared<Hold>();
  hold->wants = std::move(wants);
  hold->owner = owner;
  const Lock lock = open();
  for (const Selection& wanted : hold->wants) check(lock, wanted);
  if (desk_.try_admit(lock, hold)) {
    serve(lock, hold);
  } else {
    desk_.wait_in_line(lock, hold);
    hold->entry =
        std::make_shared<Ticket>(lease_on(hold->wants), kForeground, std::vector<Selection>());
  }
  return hold;
}

HoldPtr Runtime::share_lease(const HoldPtr& hold, std::uint64_t owner) {
  auto shared = std::make_shared<Hold>();
  shared->wants = hold->wants;
  shared->owner = owner;
  const Lock lock = open();
  if (!hold->admitted) throw Error(ErrorKind::stale_view, "the lease to share is not held");
  desk_.admit(lock, shared);
  serve(lock, shared);
  return shared;
}

void Runtime::await_lease(const HoldPtr& hold, Deadline deadline, const Poll& poll, bool all) {
  try {
    if (hold->entry) await_entry(hold, deadline, poll);
    if (all && hold->ticket) wait(hold->ticket, deadline, poll);
  } catch (...) {
    end_lease(hold);
    throw;
  }
}

// Waits until the hold is admitted. The message of a timeout says how much the hold needs and which
// models and leases are in its way.
void Runtime::await_entry(const HoldPtr& hold, Deadline deadline, const Poll& poll) {
  enter();
  Lock lock(books_.mutex);
  if (wait_until(lock, deadline, poll, [&] { return hold->entry->done; })) {
    if (hold->entry->error) std::rethrow_exception(hold->entry->error);
    return;
  }
  std::uint64_t needed = 0;
  for (const Selection& wanted : hold->wants)
    wanted.for_each([&](const Layer& layer) { needed += layer.granules_needed; });
  const std::uint64_t unleased = arena_.capacity() - books_.held_granules;
  const std::uint64_t free =
      std::min<std::uint64_t>(arena_.free_count() + arena_.uncreated_count(), unleased);
  const Error room =
      no_room(ErrorKind::timeout, lease_on(hold->wants) + " did not begin in time: it",
              needed * arena_.granule_bytes(), arena_.budget(), books_.holders(lock));
  std::string said = room.what();
  said += "; " + format_bytes(free * arena_.granule_bytes()) + " are free and " +
          format_bytes((unleased - free) * arena_.granule_bytes()) + " can be evicted";
  if (const std::size_t ahead = desk_.ahead_of(lock, hold))
    said += "; leases that wait before it: " + std::to_string(ahead);
  throw Error(ErrorKind::timeout, said);
}

bool Runtime::ready(const HoldPtr& hold, bool all) {
  enter();
  const Lock lock(books_.mutex);
  return awaited(lock, *hold, all) == nullptr;
}

bool Runtime::notify(const HoldPtr& hold, bool all, const std::shared_ptr<Waker>& waker,
                     std::uint64_t token) {
  enter();
  const Lock lock(books_.mutex);
  Ticket* ticket = awaited(lock, *hold, all);
  return ticket && ticket->notify(lock, waker, token);
}

// Returns the ticket that the lease waits for now; null if it waits for no ticket.
Ticket* Runtime::awaited(const Lock&, const Hold& hold, bool all) {
  if (hold.entry && (!hold.entry->done || hold.entry->error))
    return hold.entry->done ? nullptr : hold.entry.get();
  return all && hold.ticket && !hold.ticket->done ? hold.ticket.get() : nullptr;
}

bool Runtime::await_layer(const HoldPtr& hold, const ModelPtr& model, std::uint32_t index,
                          const std::shared_ptr<Stream>& stream, Deadline deadline,
                          const Poll& poll) {
  const Layer& layer = layer_of(*model, index);
  const auto where = [&] { return "layer " + std::to_string(index) + " of '" + model->name + "'"; };
  std::optional<Uploads::Events> copies;
  Lock lock = open();
  const bool pass = hold && hold->pass;
  if (hold && !hold->wants_layer(layer)) {
    if (!pass) throw Error(ErrorKind::invalid_argument, where() + " is not in this lease");
    if (!layer.leased()) throw Error(ErrorKind::stale_view, where() + " is not leased");
    desk_.extend(lock, *hold, layer);
  }
  const auto held = [&] {
    if (pass) return layer.leased() || layer.residency == Residency::resident;
    return hold ? hold->admitted : layer.leased();
  };
  const auto over = [&] {
    if (!held() || !layer.fill || layer.residency == Residency::resident) return true;
    if (stream && transfer_.sent(lock, layer)) copies = transfer_.copies(lock, layer);
    return copies.has_value();
  };
  if (!wait_until(lock, deadline, poll, over))
    throw Error(ErrorKind::timeout, where() + " did not arrive in time");
  if (!held())
    throw Error(ErrorKind::stale_view, where() + (pass   ? ": its lease ended before it arrived"
                                                  : hold ? ": the lease is not held"
                                                         : " is not leased"));
  if (!copies && layer.residency != Residency::resident) {
    const Hold* failed =
        hold && hold->ticket && hold->ticket->error ? hold.get() : desk_.failed(lock, layer);
    if (failed) std::rethrow_exception(failed->ticket->error);
    throw Error(ErrorKind::stale_view, where() + " is not being loaded");
  }
  const bool resident = !copies;
  if (copies) {
    if (pass) {  // the stream will use the layer even if its lease ends, so the load must go on
      LayerSet one;
      one.insert(index);
      hold->arriving.push_back(std::make_shared<Ticket>(
          "pass", kForeground, std::vector{Selection(model, std::move(one))}));
      transfer_.request(lock, hold->arriving.back());
    }
    lock.unlock();
    for (const auto& event : *copies) stream->wait_for(*event);
    copies.reset();
    lock.lock();
  }
  if (hold && !pass) hold->ordered[model.get()].insert(index);
  return resident;
}

Runtime::Pass Runtime::begin_pass(const ModelPtr& model) {
  enter();
  const Lock lock(books_.mutex);
  const HoldPtr hold = desk_.begin_pass(lock, model, this_thread());
  if (!hold) return {};
  return {hold, hold->wants.front().whole && model->missing == 0, model->lease_epoch};
}

bool Runtime::arrived(const HoldPtr& hold, const ModelPtr& model, std::uint32_t index) {
  enter();
  const Layer& layer = layer_of(*model, index);
  const Lock lock(books_.mutex);
  if (!hold->admitted || !hold->wants_layer(layer)) return false;
  const auto ordered = hold->ordered.find(model.get());
  return layer.residency == Residency::resident ||
         (ordered != hold->ordered.end() && ordered->second.contains(index));
}

void Runtime::record(const HoldPtr& hold, const std::shared_ptr<Stream>& stream) {
  enter();
  const auto fence = std::make_shared<const Fence>(stream);
  Fences past;
  const Lock lock = open();
  if (!hold->admitted) throw Error(ErrorKind::stale_view, "the lease is not held");
  for (const Selection& wanted : hold->wants) add_use(lock, wanted, fence, &past);
}

void Runtime::record(const ModelPtr& model, const std::shared_ptr<Stream>& stream) {
  enter();
  const auto fence = std::make_shared<const Fence>(stream);
  Fences past;
  const Lock lock = open();
  LayerSet leased;
  for (const Layer& layer : model->layers)
    if (layer.held()) leased.insert(layer.index);
  if (leased.empty()) throw Error(ErrorKind::stale_view, "'" + model->name + "' is not leased");
  add_use(lock, Selection(model, std::move(leased)), fence, &past);
}

void Runtime::end_lease(const HoldPtr& hold) {
  if (!device_->usable()) return;
  const Lock lock(books_.mutex);
  if (hold->depth > 1) {
    --hold->depth;
    return;
  }
  const auto drop = [&](const TicketPtr& ticket) {
    if (ticket && !ticket->done) transfer_.drop(lock, ticket, cancelled("the lease was ended"));
  };
  drop(hold->entry);
  drop(hold->ticket);
  for (const TicketPtr& ticket : hold->arriving) drop(ticket);
  desk_.leave(lock, hold);
  while (const HoldPtr next = desk_.admit_next(lock)) serve(lock, next);
}

std::pair<bool, std::uint64_t> Runtime::leased(const ModelPtr& model) {
  enter();
  const Lock lock(books_.mutex);
  const bool all = model->whole_holds > model->whole_passes ||
                   (model->leases && model->layers_leased == model->layers.size());
  return {all && model->missing == 0, model->leases ? model->lease_epoch : 0};
}

}  // namespace warmserve
