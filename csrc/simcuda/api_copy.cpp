// Copies and fills. Their addresses are checked when they are enqueued, as the real driver does,
// and again when they run.
#include "simcuda/call.h"
#include "simcuda/capture.h"

namespace warmserve::simcuda {
namespace {

enum class Side { host, device, either };

// Returns whether the whole range is of the kind that the call states, and mapped with access.
bool check(Call& call, Side side, Address address, std::uint64_t bytes, bool write, int device,
           Place* place) {
  Memory& memory = call.sim->memory;
  *place = address == 0 ? Place::broken : memory.place(address, bytes);
  if (*place == Place::broken) return false;
  if (side == Side::host && *place == Place::device) return false;
  if (side == Side::device && *place == Place::pageable) return false;
  if (*place == Place::pinned && write && memory.pinned_at(address)->read_only()) return false;
  if (*place != Place::device) return true;
  std::vector<Piece> pieces;
  if (!memory.walk(address, bytes, &pieces)) return false;
  const int need = write ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ;
  for (const Piece& piece : pieces)
    if ((piece.mapping->access[device] & need) != need) return false;
  return true;
}

struct Request {
  Address to, from;
  std::uint64_t bytes;
  Side to_side, from_side;
};

CUresult submit(Call& call, Stream& stream, Work work, OperationPtr* out) {
  if (stream.capture) return add_node(stream, std::move(work));
  return call.sim->enqueue(stream, std::move(work), call.origin(), out);
}

CUresult copy(Call& call, const Request& request, Stream& stream, bool synchronous) {
  if (const CUresult refused = legacy_use(call, stream); refused != CUDA_SUCCESS) return refused;
  if (request.bytes == 0) return CUDA_SUCCESS;
  const int device = stream.context->device;
  Copy copy;
  copy.to = request.to;
  copy.from = request.from;
  copy.bytes = request.bytes;
  if (!check(call, request.to_side, copy.to, copy.bytes, true, device, &copy.to_place) ||
      !check(call, request.from_side, copy.from, copy.bytes, false, device, &copy.from_place))
    return CUDA_ERROR_INVALID_VALUE;
  const bool between_devices = copy.to_place == Place::device && copy.from_place == Place::device;
  if (copy.to - copy.from < copy.bytes || copy.from - copy.to < copy.bytes)
    call.sim->detector.violation("misuse", "source and destination of a copy overlap", call.number);
  // The program may reuse a pageable source when the call returns, so its content is saved. A
  // captured copy keeps the address instead.
  if (copy.from_place == Place::pageable && !stream.capture) {
    const auto* const bytes = reinterpret_cast<const std::byte*>(copy.from);
    copy.snapshot = std::make_shared<std::vector<std::byte>>(bytes, bytes + copy.bytes);
  }
  const bool waits =
      !stream.capture && (synchronous ? !between_devices : copy.to_place == Place::pageable);
  // A copy from pageable memory to the device first waits for the stream and then stages the
  // source. The copy itself may still be running when the call returns [D API sync behavior].
  const bool staged = copy.from_place == Place::pageable && copy.to_place == Place::device;
  VectorClock clock;
  if (waits && staged) clock = call.sim->clock_of_next(stream);
  OperationPtr operation;
  const CUresult result = submit(call, stream, std::move(copy), &operation);
  if (result != CUDA_SUCCESS || !waits) return result;
  if (!staged) clock = stream.clock;
  const CUresult state = call.sim->wait_for(call.lock, operation, stream.context);
  // CUDA does not guarantee that an asynchronous copy to pageable memory waits.
  if (synchronous && state == CUDA_SUCCESS) call.sim->detector.host_knows(clock);
  return state;
}

CUresult copy_now(Function function, const Request& request) {
  Call call(function, Need::work, request.bytes);
  if (!call) return call.status;
  Stream* const stream = call.stream(CU_STREAM_LEGACY);
  if (!stream) return call.status;
  if (const CUresult refused = legacy_use(call, *stream); refused != CUDA_SUCCESS) return refused;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  return copy(call, request, *stream, true);
}

CUresult copy_later(Function function, const Request& request, CUstream handle) {
  Call call(function, Need::work, request.bytes);
  if (!call) return call.status;
  Stream* const stream = call.stream(handle);
  return stream ? copy(call, request, *stream, false) : call.status;
}

Address as_address(const void* pointer) { return reinterpret_cast<Address>(pointer); }

CUresult fill(Function function, Address to, std::uint32_t value, unsigned width,
              std::uint64_t count, CUstream handle, bool synchronous) {
  Call call(function, Need::work, count * width);
  if (!call) return call.status;
  Stream* const stream = call.stream(handle);
  if (!stream) return call.status;
  if (const CUresult refused = legacy_use(call, *stream); refused != CUDA_SUCCESS) return refused;
  if (synchronous)
    if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  if (count == 0) return CUDA_SUCCESS;
  Fill fill{to, {}, count * width, width, value};
  if (count > ~std::uint64_t{0} / width || to % width ||
      !check(call, Side::device, to, fill.bytes, true, stream->context->device, &fill.place))
    return CUDA_ERROR_INVALID_VALUE;
  const bool waits = synchronous && fill.place == Place::pinned;  // [D API sync behavior]
  OperationPtr operation;
  const CUresult result = submit(call, *stream, fill, &operation);
  if (result != CUDA_SUCCESS || !waits) return result;
  const VectorClock clock = stream->clock;
  const CUresult state = call.sim->wait_for(call.lock, operation, stream->context);
  if (state == CUDA_SUCCESS) call.sim->detector.host_knows(clock);
  return state;
}

}  // namespace

CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, std::size_t bytes) {
  return copy_now(Function::cuMemcpy, {to, from, bytes, Side::either, Side::either});
}
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  return copy_later(Function::cuMemcpyAsync, {to, from, bytes, Side::either, Side::either}, stream);
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, std::size_t bytes) {
  return copy_now(Function::cuMemcpyHtoD_v2,
                  {to, as_address(from), bytes, Side::device, Side::host});
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, std::size_t bytes,
                              CUstream stream) {
  return copy_later(Function::cuMemcpyHtoDAsync_v2,
                    {to, as_address(from), bytes, Side::device, Side::host}, stream);
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, std::size_t bytes) {
  return copy_now(Function::cuMemcpyDtoH_v2,
                  {as_address(to), from, bytes, Side::host, Side::device});
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  return copy_later(Function::cuMemcpyDtoHAsync_v2,
                    {as_address(to), from, bytes, Side::host, Side::device}, stream);
}
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes) {
  return copy_now(Function::cuMemcpyDtoD_v2, {to, from, bytes, Side::device, Side::device});
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes,
                              CUstream stream) {
  return copy_later(Function::cuMemcpyDtoDAsync_v2, {to, from, bytes, Side::device, Side::device},
                    stream);
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, std::size_t count) {
  return fill(Function::cuMemsetD8_v2, to, value, 1, count, CU_STREAM_LEGACY, true);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, std::size_t count, CUstream stream) {
  return fill(Function::cuMemsetD8Async, to, value, 1, count, stream, false);
}
CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short value, std::size_t count) {
  return fill(Function::cuMemsetD16_v2, to, value, 2, count, CU_STREAM_LEGACY, true);
}
CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, std::size_t count,
                          CUstream stream) {
  return fill(Function::cuMemsetD16Async, to, value, 2, count, stream, false);
}
CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, std::size_t count) {
  return fill(Function::cuMemsetD32_v2, to, value, 4, count, CU_STREAM_LEGACY, true);
}
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, std::size_t count, CUstream stream) {
  return fill(Function::cuMemsetD32Async, to, value, 4, count, stream, false);
}

}  // namespace warmserve::simcuda
