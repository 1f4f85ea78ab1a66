// A CUDA device, used through the driver API only, in the device's primary context.
#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "driver/cuda/context.h"
#include "driver/cuda/granules.h"
#include "driver/driver.h"
#include "driver/host_memory.h"

namespace warmserve {
namespace {

using namespace cuda;

CUstream stream_of(StreamId id) { return reinterpret_cast<CUstream>(id); }
CUevent event_of(EventId id) { return reinterpret_cast<CUevent>(id); }

// The reason why a primitive failed on this thread, if no function of libcuda gave one.
thread_local std::string own_detail;

class CudaDriver final : public Driver {
 public:
  explicit CudaDriver(const CudaOptions& options);
  ~CudaDriver() override;

  const DeviceFacts& facts() const noexcept override { return facts_; }
  std::string detail() const override {
    std::string own = std::exchange(own_detail, {});
    return own.empty() ? context_.detail() : own;
  }
  Status memory(std::uint64_t* available, std::uint64_t* total) override;

  Status granule_create(std::uint64_t bytes, Handle* out) override {
    return granules_.create(bytes, out);
  }
  Status granule_release(Handle handle) override { return granules_.release(handle); }
  Status granule_export(Handle handle, SharedGranule* out) override {
    return granules_.share(handle, out);
  }
  Status granule_import(const SharedGranule& shared, std::uint64_t bytes, Handle* out) override {
    return granules_.import(shared, bytes, out);
  }
  std::byte* host_view(Handle handle) noexcept override { return granules_.host_view(handle); }
  // Integrated devices are coherent with the CPU.
  void host_wrote(Handle, std::uint64_t, std::uint64_t) noexcept override {}
  Status address_reserve(std::uint64_t bytes, Address* out) override;
  Status address_free(Address address, std::uint64_t bytes) override;
  Status map(Address address, const Handle* handles, std::size_t count) override;
  Status unmap(Address address, std::uint64_t bytes) override;
  Status set_access(Address address, std::uint64_t bytes, Access access) override;
  Status pinned_create(std::uint64_t bytes, std::byte** out) override;
  Status pinned_release(std::byte* address, std::uint64_t bytes) override;
  Status stream_create(StreamPriority priority, StreamId* out) override;
  Status stream_adopt(std::uint64_t handle, StreamId* out) override;
  Status stream_destroy(StreamId stream) override;
  Status stream_synchronize(StreamId stream) override;
  Status stream_capturing(StreamId stream, bool* out) override;
  Status device_synchronize() override;
  Status stream_wait_event(StreamId stream, EventId event) override;
  Status stream_step(StreamId) override { return Status::invalid; }
  Status event_create(EventId* out) override;
  Status event_destroy(EventId event) override;
  Status event_record(EventId event, StreamId stream) override;
  Status event_query(EventId event) override;
  Status event_wait(EventId event, std::chrono::microseconds timeout) override;
  Status copy_to_device(Address to, const std::byte* from, std::uint64_t bytes,
                        StreamId stream) override;
  Status copy_from_device(std::byte* to, Address from, std::uint64_t bytes,
                          StreamId stream) override;
  Status copy_to_peer(Address to, Address from, std::uint64_t bytes, StreamId stream) override;
  Status fill_zero(Address to, std::uint64_t bytes, StreamId stream) override;
  void host_read(std::uint64_t bytes) noexcept override {
    if (const auto read = context_.library().simcuda_host_read) read(bytes);
  }
  Status launch(const KernelCall& call, StreamId stream) override;

 private:
  void load_kernels(const std::string& image);
  Status settle(Address address, std::uint64_t bytes);

  Context context_;
  Granules granules_;
  int numa_node_;  // of the host, next to the device; kAnyNode if there are no nodes
  DeviceFacts facts_;
  std::vector<CUdevice> peers_;
  int least_priority_ = 0, greatest_priority_ = 0;
  CUmodule module_ = nullptr;

  std::mutex mutex_;  // guards all below; a leaf; not held over driver calls
  // Address and bytes of mappings that a failed map() could not undo.
  std::map<Address, std::uint64_t> stuck_;
  std::unordered_map<std::string, CUfunction> functions_;
};

#define CALL(function, ...) WARMSERVE_CUDA_CALL(context_, function, __VA_ARGS__)

CudaDriver::CudaDriver(const CudaOptions& options)
    : context_(options.library, options.ordinal),
      granules_(context_),
      numa_node_(context_.attribute(CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, kAnyNode)) {
  facts_.name = context_.name();
  facts_.granularity = granules_.granularity();
  facts_.host_view = granules_.integrated();
  facts_.cuda_ordinal = options.ordinal;
  for (const int ordinal : options.peers) peers_.push_back(context_.open_peer(ordinal));
  facts_.peers = options.peers;
  load_kernels(options.kernels);
  CALL(cuCtxGetStreamPriorityRange, &least_priority_, &greatest_priority_);
}

CudaDriver::~CudaDriver() {
  if (module_) CALL(cuModuleUnload, module_);
}

// Without kernels everything but launch() works.
void CudaDriver::load_kernels(const std::string& image) {
  facts_.no_kernels = "they were not built with this package: reinstall it where nvcc is available";
  if (image.empty()) return;
  if (!context_.attribute(CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)) {
    facts_.no_kernels = "the device and the CPU use different addresses for pinned memory";
    return;
  }
  facts_.no_kernels.clear();
  if (CALL(cuModuleLoadData, &module_, image.data()) != Status::ok) {
    facts_.no_kernels = detail();
    module_ = nullptr;
  }
}

Status CudaDriver::memory(std::uint64_t* available, std::uint64_t* total) {
  std::size_t free_bytes = 0, all_bytes = 0;
  const Status status = CALL(cuMemGetInfo_v2, &free_bytes, &all_bytes);
  *available = free_bytes;
  *total = all_bytes;
  return status;
}

Status CudaDriver::address_reserve(std::uint64_t bytes, Address* out) {
  CUdeviceptr address = 0;
  const Status status =
      CALL(cuMemAddressReserve, &address, bytes, facts_.granularity, CUdeviceptr{0}, 0ull);
  if (status == Status::out_of_memory) return Status::out_of_addresses;
  *out = address;
  return status;
}

Status CudaDriver::address_free(Address address, std::uint64_t bytes) {
  if (const Status settled = settle(address, bytes); settled != Status::ok) return settled;
  return CALL(cuMemAddressFree, CUdeviceptr{address}, bytes);
}

// Removes the mappings that an earlier failed map() left in the range.
Status CudaDriver::settle(Address address, std::uint64_t bytes) {
  for (;;) {
    std::pair<Address, std::uint64_t> stuck;
    {
      const std::lock_guard lock(mutex_);
      const auto found = stuck_.lower_bound(address);
      if (found == stuck_.end() || found->first >= address + bytes) return Status::ok;
      stuck = *found;
    }
    const Status status = CALL(cuMemUnmap, CUdeviceptr{stuck.first}, stuck.second);
    if (status != Status::ok) return status;
    const std::lock_guard lock(mutex_);
    stuck_.erase(stuck.first);
  }
}

Status CudaDriver::map(Address address, const Handle* handles, std::size_t count) {
  std::vector<std::uint64_t> sizes;
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const auto bytes = granules_.bytes(handles[i]);
    if (!bytes) return Status::invalid;
    sizes.push_back(*bytes);
    total += *bytes;
  }
  if (const Status settled = settle(address, total); settled != Status::ok) return settled;
  const Context::Scope scope(context_);
  if (scope.status() != Status::ok) return scope.status();
  std::uint64_t mapped = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Status status = context_.translate(
        "cuMemMap",
        context_.library().cuMemMap(address + mapped, sizes[i], 0,
                                    static_cast<CUmemGenericAllocationHandle>(handles[i]), 0));
    if (status != Status::ok) {
      if (mapped && context_.library().cuMemUnmap(address, mapped) != CUDA_SUCCESS) {
        const std::lock_guard lock(mutex_);
        stuck_[address] = mapped;
      }
      return status;
    }
    mapped += sizes[i];
  }
  granules_.mapped(address, {handles, count});
  return Status::ok;
}

Status CudaDriver::unmap(Address address, std::uint64_t bytes) {
  const Status status = CALL(cuMemUnmap, CUdeviceptr{address}, bytes);
  if (status == Status::ok) granules_.unmapped(address, bytes);
  return status;
}

Status CudaDriver::set_access(Address address, std::uint64_t bytes, Access access) {
  if (access == Access::read_write && granules_.read_only(address, bytes)) {
    own_detail = "a granule of another process can only be read";
    return Status::invalid;
  }
  std::vector<CUmemAccessDesc> wanted{{{CU_MEM_LOCATION_TYPE_DEVICE, context_.device()},
                                       access == Access::none ? CU_MEM_ACCESS_FLAGS_PROT_NONE
                                       : access == Access::read
                                           ? CU_MEM_ACCESS_FLAGS_PROT_READ
                                           : CU_MEM_ACCESS_FLAGS_PROT_READWRITE}};
  if (access == Access::read_write)
    for (const CUdevice peer : peers_)
      wanted.push_back({{CU_MEM_LOCATION_TYPE_DEVICE, peer}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
  return CALL(cuMemSetAccess, CUdeviceptr{address}, bytes, wanted.data(), wanted.size());
}

// Registers memory instead of letting the driver allocate it: exactly the bytes requested, and
// about twice as fast. Portable, so that every context of the process may copy from it. The memory
// is on the NUMA node next to the device.
Status CudaDriver::pinned_create(std::uint64_t bytes, std::byte** out) {
  if (bytes == 0) return Status::invalid;
  if (context_.lost()) return Status::device_lost;
  std::string why;
  std::byte* memory = allocate_touched(bytes, numa_node_, &why);
  if (!memory) {
    own_detail = std::move(why);
    return Status::out_of_memory;
  }
  const Status status = CALL(cuMemHostRegister_v2, memory, bytes,
                             CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
  if (status != Status::ok) {
    free_touched(memory, bytes);
    return status;
  }
  *out = memory;
  return Status::ok;
}

Status CudaDriver::pinned_release(std::byte* address, std::uint64_t bytes) {
  const Status status = CALL(cuMemHostUnregister, address);
  if (status != Status::ok && status != Status::device_lost) return status;
  return free_touched(address, bytes) ? status : Status::failed;
}

Status CudaDriver::stream_create(StreamPriority priority, StreamId* out) {
  // Lower numbers are more urgent, and 0 is the least urgent of the usual range.
  const int number = priority == StreamPriority::urgent ? greatest_priority_
                     : priority == StreamPriority::background
                         ? least_priority_
                         : (least_priority_ + greatest_priority_) / 2;
  CUstream stream = nullptr;
  const Status status = CALL(cuStreamCreateWithPriority, &stream, CU_STREAM_NON_BLOCKING, number);
  *out = StreamId{reinterpret_cast<std::uint64_t>(stream)};
  return status;
}

Status CudaDriver::stream_destroy(StreamId stream) {
  return CALL(cuStreamDestroy_v2, stream_of(stream));
}
Status CudaDriver::stream_synchronize(StreamId stream) {
  return CALL(cuStreamSynchronize, stream_of(stream));
}

// A stream of another context would take our device's events only to fail at each use.
Status CudaDriver::stream_adopt(std::uint64_t handle, StreamId* out) {
  const StreamId id{handle};  // 0 is the legacy default stream of this context
  CUcontext context = nullptr;
  if (const Status status = CALL(cuStreamGetCtx, stream_of(id), &context); status != Status::ok)
    return status;
  if (context != context_.handle()) {
    own_detail = "it belongs to another device, or to a context that is not the primary one";
    return Status::invalid;
  }
  *out = id;
  return Status::ok;
}

// The legacy stream is not captured itself, but any use of it ends the captures of blocking
// streams.
Status CudaDriver::stream_capturing(StreamId stream, bool* out) {
  const Context::Scope scope(context_);
  if (scope.status() != Status::ok) return scope.status();
  CUstreamCaptureStatus capture = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = context_.library().cuStreamIsCapturing(stream_of(stream), &capture);
  *out = capture != CU_STREAM_CAPTURE_STATUS_NONE || result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  return *out ? Status::ok : context_.translate("cuStreamIsCapturing", result);
}

Status CudaDriver::device_synchronize() {
  const Context::Scope scope(context_);
  if (scope.status() != Status::ok) return scope.status();
  return context_.translate("cuCtxSynchronize", context_.library().cuCtxSynchronize());
}

Status CudaDriver::stream_wait_event(StreamId stream, EventId event) {
  return CALL(cuStreamWaitEvent, stream_of(stream), event_of(event), 0u);
}

Status CudaDriver::event_create(EventId* out) {
  CUevent event = nullptr;
  const Status status = CALL(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);
  *out = EventId{reinterpret_cast<std::uint64_t>(event)};
  return status;
}
Status CudaDriver::event_destroy(EventId event) { return CALL(cuEventDestroy_v2, event_of(event)); }
Status CudaDriver::event_record(EventId event, StreamId stream) {
  return CALL(cuEventRecord, event_of(event), stream_of(stream));
}
Status CudaDriver::event_query(EventId event) { return CALL(cuEventQuery, event_of(event)); }

// CUDA has no wait with a timeout, so this polls at growing intervals: a chunk's copy takes some
// hundred microseconds, and a thread that spins takes a core from the engine.
Status CudaDriver::event_wait(EventId event, std::chrono::microseconds timeout) {
  using std::chrono::microseconds;
  const auto begin = Clock::now();
  for (microseconds pause{5};; pause = std::min(pause * 2, microseconds(200))) {
    const Status status = event_query(event);
    const auto left = timeout - std::chrono::duration_cast<microseconds>(Clock::now() - begin);
    if (status != Status::not_ready || left <= microseconds(0)) return status;
    context_.library().sleep(std::min(pause, left));
  }
}

Status CudaDriver::copy_to_device(Address to, const std::byte* from, std::uint64_t bytes,
                                  StreamId stream) {
  return CALL(cuMemcpyHtoDAsync_v2, CUdeviceptr{to}, from, bytes, stream_of(stream));
}
Status CudaDriver::copy_from_device(std::byte* to, Address from, std::uint64_t bytes,
                                    StreamId stream) {
  return CALL(cuMemcpyDtoHAsync_v2, to, CUdeviceptr{from}, bytes, stream_of(stream));
}

// Both addresses are in the unified address space, and the other device grants this one access.
Status CudaDriver::copy_to_peer(Address to, Address from, std::uint64_t bytes, StreamId stream) {
  return CALL(cuMemcpyDtoDAsync_v2, CUdeviceptr{to}, CUdeviceptr{from}, bytes, stream_of(stream));
}

Status CudaDriver::fill_zero(Address to, std::uint64_t bytes, StreamId stream) {
  return CALL(cuMemsetD8Async, CUdeviceptr{to}, static_cast<unsigned char>(0), bytes,
              stream_of(stream));
}

Status CudaDriver::launch(const KernelCall& call, StreamId stream) {
  if (misuse(call) != Misuse::none) return Status::invalid;
  if (!module_) return Status::failed;
  const Context::Scope scope(context_);
  if (scope.status() != Status::ok) return scope.status();
  CUfunction function = nullptr;
  const std::string name = kernel_symbol(call);
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = functions_.find(name); found != functions_.end())
      function = found->second;
  }
  if (!function) {
    const Status found = context_.translate(
        "cuModuleGetFunction",
        context_.library().cuModuleGetFunction(&function, module_, name.c_str()));
    if (found != Status::ok) return found;
    const std::lock_guard lock(mutex_);
    functions_[name] = function;
  }
  const LaunchShape shape = launch_shape(call);
  return std::visit(
      [&](auto parameter) {
        void* parameters[] = {&parameter};
        return context_.translate(
            "cuLaunchKernel",
            context_.library().cuLaunchKernel(function, shape.blocks, 1, 1, shape.threads, 1, 1, 0,
                                              stream_of(stream), parameters, nullptr));
      },
      call);
}

}  // namespace

std::shared_ptr<Driver> make_cuda_driver(const CudaOptions& options) {
  return std::make_shared<CudaDriver>(options);
}

}  // namespace warmserve
