// A client's requests to its broker.
#include <algorithm>
#include <utility>

#include "runtime/attachment.h"
#include "runtime/enrolment.h"

namespace warmserve {
namespace {

std::vector<std::uint32_t> indices(const LayerSet& layers) {
  std::vector<std::uint32_t> found;
  layers.for_each([&](std::uint32_t index) { found.push_back(index); });
  return found;
}

// The time left in nanoseconds, as messages carry it; kNever as the largest number.
std::uint64_t nanoseconds_left(Deadline deadline) {
  if (deadline == kNever) return UINT64_MAX;
  return static_cast<std::uint64_t>(
      std::max<std::int64_t>(0, std::chrono::nanoseconds(deadline - Clock::now()).count()));
}

// How much longer an answer may take than a deadline that the broker itself keeps.
constexpr std::chrono::milliseconds kGrace{500};

}  // namespace

// Sends a message and returns the number of its request, which is new.
std::uint64_t Attachment::send(Message message) {
  const std::lock_guard lock(mutex_);
  return send_locked(std::move(message));
}

std::uint64_t Attachment::send_locked(Message message) {
  if (!lost_.empty()) throw Error(ErrorKind::general, lost_);
  const std::uint64_t request = message.request = next_request_++;
  connection_->channel.send(std::move(message));
  if (connection_->channel.queued()) wake_.signal();
  return request;
}

// Sends a request and waits for its answer.
std::vector<std::byte> Attachment::call(const MakeMessage& make, Deadline deadline,
                                        const Poll& poll) {
  const auto call = std::make_shared<Call>();
  std::unique_lock lock(mutex_);
  calls_.emplace(send_locked(make()), call);
  wake_.signal();
  while (!call->done) {  // after an exception the call stays listed, because it is still answered
    if (Clock::now() >= deadline)
      throw Error(ErrorKind::timeout,
                  "the broker at " + connection_->path + " did not answer in time");
    if (threaded_) {
      answered_.wait_until(lock, std::min(deadline, Clock::now() + kPollInterval));
    } else {
      lock.unlock();
      serve(kPollInterval);
      lock.lock();
    }
    if (poll && !call->done) {
      lock.unlock();
      poll();
      lock.lock();
    }
  }
  if (call->error) std::rethrow_exception(call->error);
  return std::move(call->body);
}

void Attachment::enroll(const ModelPtr& model, const Poll& poll) {
  for (Message& files : files_of(*model)) send(std::move(files));
  const std::vector<std::byte> answer = call([&] { return enrolment_of(*model); }, kNever, poll);
  const Lock lock = state_.lock();
  model->broker_id = Reader(answer).number();
  models_[model->broker_id] = model;
}

void Attachment::evict(const Model& model, const LayerSet& layers, std::uint32_t wait_for,
                       Deadline deadline, const Poll& poll) {
  const MakeMessage make = [&] {
    Writer writer;
    writer.number(model.broker_id).numbers(indices(layers)).number(wait_for);
    return Message{.op = Op::evict, .body = writer.number(nanoseconds_left(deadline)).take()};
  };
  // The broker keeps to the deadline, unless it hangs.
  call(make, deadline == kNever ? kNever : std::max(deadline, Clock::now()) + kGrace, poll);
}

void Attachment::keep(const Lock&, const Model& model) {
  Writer writer;
  writer.number(model.broker_id).number(model.layers.size());
  for (const Layer& layer : model.layers) writer.real(layer.keep_value);
  send({.op = Op::keep, .body = writer.take()});
}

std::uint64_t Attachment::want(const Lock&, const Model& model, const LayerSet& layers,
                               const WantOptions& options) {
  if (!model.broker_id)
    throw Error(ErrorKind::general, "the broker at " + connection_->path + " has no '" +
                                        model.name + "' any more: " + refused_[model.name]);
  Writer writer;
  writer.number(model.broker_id).numbers(indices(layers)).number(options.lease);
  writer.number(static_cast<std::uint64_t>(static_cast<std::int64_t>(options.priority)));
  writer.number(nanoseconds_left(options.deadline)).real(options.evict_below);
  writer.number(options.swapped_out ? options.swapped_out->broker_id.load() : 0);
  return send({.op = Op::want, .body = writer.take()});
}

void Attachment::cancel(const Lock&, std::uint64_t request, const Layer& layer) {
  Writer writer;
  writer.number(request).number(layer.index);
  try {
    send({.op = Op::cancel, .body = writer.take()});
  } catch (const Error&) {  // the broker has ended, which ends the request
  }
}

void Attachment::unmapped(std::span<Layer* const> layers) noexcept {
  for (Layer* layer : layers) state_.arena.destroy(layer->granules);
  const std::lock_guard lock(mutex_);
  std::map<std::uint64_t, std::vector<std::uint32_t>> indices;
  for (const Layer* layer : layers)
    if (layer->model->broker_id) indices[layer->model->broker_id].push_back(layer->index);
  for (const auto& [model, unmapped] : indices) try {
      send_locked({.op = Op::unmapped, .body = Writer().number(model).numbers(unmapped).take()});
    } catch (const Error&) {  // the broker has ended; the next one is told what is still mapped
    }
}

}  // namespace warmserve
