// A CUDA device, through the driver API alone.
//
// It lives in the device's primary context, which is the one that torch and CuPy use. Every call
// makes that context current for its own time and puts its thread into relaxed capture mode, so
// that a stream capture elsewhere in the process is not broken by it, and leaves the thread as it
// was. An error that the context cannot recover from is kept: every later call says so.
#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "driver/cuda_library.h"
#include "driver/driver.h"
#include "driver/host_memory.h"
#include "error.h"

namespace warmserve {
namespace {

using namespace cuda;

CUstream stream_of(StreamId id) { return reinterpret_cast<CUstream>(id); }
CUevent event_of(EventId id) { return reinterpret_cast<CUevent>(id); }

// The call of this thread that failed last. Of no driver in particular: it is asked for at once.
thread_local const char* failed_call = nullptr;
thread_local CUresult failed_with = CUDA_SUCCESS;

class CudaDriver final : public Driver {
 public:
  CudaDriver(const CudaOptions& options, Library library);
  ~CudaDriver() override;

  const DeviceFacts& facts() const noexcept override { return facts_; }
  std::string detail() const override {
    if (const CUresult lost = lost_.load())
      return "the CUDA context died of " + describe(lost) +
             "; restart the process to use the device again";
    return failed_call ? std::string(failed_call) + " returned " + describe(failed_with) : "";
  }
  Status memory(std::uint64_t* available, std::uint64_t* total) override;

  Status granule_create(std::uint64_t bytes, Handle* out) override;
  Status granule_release(Handle handle) override;
  std::byte* host_view(Handle) noexcept override { return nullptr; }
  void host_wrote(Handle, std::uint64_t, std::uint64_t) noexcept override {}
  Status address_reserve(std::uint64_t bytes, Address* out) override;
  Status address_free(Address address, std::uint64_t bytes) override;
  Status map(Address address, const Handle* handles, std::size_t count) override;
  Status unmap(Address address, std::uint64_t bytes) override;
  Status set_access(Address address, std::uint64_t bytes, Access access) override;
  Status pinned_create(std::uint64_t bytes, std::byte** out) override;
  Status pinned_release(std::byte* address, std::uint64_t bytes) override;
  Status stream_create(StreamPriority priority, StreamId* out) override;
  Status stream_adopt(std::uint64_t handle, StreamId* out) override {
    *out = StreamId{handle};  // 0 is the legacy default stream
    return Status::ok;
  }
  Status stream_destroy(StreamId stream) override;
  Status stream_synchronize(StreamId stream) override;
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
  Status launch(const KernelCall& call, StreamId stream) override;

 private:
  // The context current and the thread relaxed, for one call into the driver.
  class Scope {
   public:
    explicit Scope(CudaDriver& driver);
    ~Scope();
    Scope(const Scope&) = delete;
    Status status() const noexcept { return status_; }

   private:
    CudaDriver& driver_;
    CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
    bool pushed_ = false, relaxed_ = false;
    Status status_;
  };

  void open_device(int ordinal);
  void probe_granule_kind();
  void load_kernels(const std::string& image);
  int attribute(CUdevice_attribute which) const;
  Status settle(Address address, std::uint64_t bytes);
  Status translate(const char* function, CUresult result);
  // Calls one function inside a scope.
  template <typename Function, typename... Args>
  Status call(const char* name, Function function, Args... args) {
    const Scope scope(*this);
    if (scope.status() != Status::ok) return scope.status();
    return translate(name, function(args...));
  }

  const Library cuda_;
  DeviceFacts facts_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  CUmemAllocationProp granule_kind_{};
  int least_priority_ = 0, greatest_priority_ = 0;
  CUmodule module_ = nullptr;
  std::atomic<CUresult> lost_{CUDA_SUCCESS};

  std::mutex mutex_;                                        // a leaf; not held over calls
  std::unordered_map<std::uint64_t, std::uint64_t> bytes_;  // of each granule, by handle
  std::map<Address, std::uint64_t> stuck_;                  // mapped by a map() that failed and
                                                            // could not be undone; address, bytes
  std::unordered_map<std::string, CUfunction> functions_;
};

#define CALL(function, ...) call(#function, cuda_.function, __VA_ARGS__)

CudaDriver::Scope::Scope(CudaDriver& driver) : driver_(driver) {
  failed_call = nullptr;
  if (driver_.lost_.load()) {
    status_ = Status::device_lost;
    return;
  }
  CUcontext current = nullptr;
  status_ = driver_.translate("cuCtxGetCurrent", driver_.cuda_.cuCtxGetCurrent(&current));
  if (status_ == Status::ok && current != driver_.context_) {
    status_ =
        driver_.translate("cuCtxPushCurrent", driver_.cuda_.cuCtxPushCurrent_v2(driver_.context_));
    pushed_ = status_ == Status::ok;
  }
  if (status_ != Status::ok) return;
  status_ = driver_.translate("cuThreadExchangeStreamCaptureMode",
                              driver_.cuda_.cuThreadExchangeStreamCaptureMode(&mode_));
  relaxed_ = status_ == Status::ok;
}

// What fails here leaves the thread relaxed, or with our context current: nothing of ours minds. A
// context that died is told by the next call.
CudaDriver::Scope::~Scope() {
  const auto note = [this](CUresult result) {
    if (is_sticky(result)) driver_.lost_.store(result);
  };
  if (relaxed_) note(driver_.cuda_.cuThreadExchangeStreamCaptureMode(&mode_));
  CUcontext popped = nullptr;
  if (pushed_) note(driver_.cuda_.cuCtxPopCurrent_v2(&popped));
}

Status CudaDriver::translate(const char* function, CUresult result) {
  if (result == CUDA_SUCCESS) return Status::ok;
  if (result == CUDA_ERROR_NOT_READY) return Status::not_ready;
  failed_call = function;
  failed_with = result;
  if (is_sticky(result)) {
    CUresult none = CUDA_SUCCESS;
    lost_.compare_exchange_strong(none, result);
    return Status::device_lost;
  }
  switch (result) {
    case CUDA_ERROR_OUT_OF_MEMORY: return Status::out_of_memory;
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_INVALID_HANDLE: return Status::invalid;
    default: return Status::failed;
  }
}

CudaDriver::CudaDriver(const CudaOptions& options, Library library) : cuda_(library) {
  open_device(options.ordinal);
  CUresult result = cuda_.cuDevicePrimaryCtxRetain(&context_, device_);
  if (result != CUDA_SUCCESS)
    throw Error(ErrorKind::general, "the context of " + facts_.name +
                                        " cannot be had: " + describe(result) +
                                        "; is another process using it exclusively?");
  probe_granule_kind();
  load_kernels(options.kernels);
  CALL(cuCtxGetStreamPriorityRange, &least_priority_, &greatest_priority_);
}

CudaDriver::~CudaDriver() {
  if (module_) CALL(cuModuleUnload, module_);
  if (!lost_.load()) cuda_.cuDevicePrimaryCtxRelease_v2(device_);
}

int CudaDriver::attribute(CUdevice_attribute which) const {
  int value = 0;
  return cuda_.cuDeviceGetAttribute(&value, which, device_) == CUDA_SUCCESS ? value : 0;
}

void CudaDriver::open_device(int ordinal) {
  int count = 0;
  cuda_.cuDeviceGetCount(&count);
  const std::string asked = "cuda:" + std::to_string(ordinal);
  if (ordinal < 0 || ordinal >= count)
    throw Error(ErrorKind::invalid_argument,
                "no device " + asked + ": " + std::to_string(count) + " are visible" +
                    (count ? ", cuda:0 to cuda:" + std::to_string(count - 1) : ""));
  const auto require = [&](CUresult result, const char* function) {
    if (result != CUDA_SUCCESS)
      throw Error(ErrorKind::general, asked + ": " + function + " returned " + describe(result));
  };
  require(cuda_.cuDeviceGet(&device_, ordinal), "cuDeviceGet");
  char name[128] = {};
  require(cuda_.cuDeviceGetName(name, sizeof name - 1, device_), "cuDeviceGetName");
  facts_.name = asked + " (" + name + ")";
  if (!attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED))
    throw Error(ErrorKind::general,
                facts_.name + " has no virtual memory management: nothing can be swapped in place");
  granule_kind_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  granule_kind_.location = {CU_MEM_LOCATION_TYPE_DEVICE, device_};
  // Neither can be added later: a granule that may be shared or read by a network card is created
  // so.
  if (attribute(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED))
    granule_kind_.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  if (attribute(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED))
    granule_kind_.allocFlags.gpuDirectRDMACapable = 1;
  std::size_t granularity = 0;
  require(cuda_.cuMemGetAllocationGranularity(&granularity, &granule_kind_,
                                              CU_MEM_ALLOC_GRANULARITY_MINIMUM),
          "cuMemGetAllocationGranularity");
  facts_.granularity = granularity;
  facts_.host_view = false;
  facts_.cuda_ordinal = ordinal;
}

// The attributes promise more than every system keeps (a container may forbid it): what is refused
// is done without, the network card's first.
void CudaDriver::probe_granule_kind() {
  const auto possible = [this] {
    CUmemGenericAllocationHandle handle = 0;
    const Status status =
        CALL(cuMemCreate, &handle, std::size_t{facts_.granularity}, &granule_kind_, 0ull);
    if (status == Status::ok) CALL(cuMemRelease, handle);
    return status == Status::ok || status == Status::out_of_memory;
  };
  if (possible()) return;
  granule_kind_.allocFlags.gpuDirectRDMACapable = 0;
  if (possible()) return;
  granule_kind_.requestedHandleTypes = CU_MEM_HANDLE_TYPE_NONE;
}

// Without kernels everything but launch() works.
void CudaDriver::load_kernels(const std::string& image) {
  facts_.no_kernels = "they were not built with this package: install it where nvcc is";
  if (image.empty()) return;
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

Status CudaDriver::granule_create(std::uint64_t bytes, Handle* out) {
  CUmemGenericAllocationHandle handle = 0;
  const Status status = CALL(cuMemCreate, &handle, bytes, &granule_kind_, 0ull);
  if (status != Status::ok) return status;
  const std::lock_guard lock(mutex_);
  bytes_[handle] = bytes;
  *out = Handle{handle};
  return Status::ok;
}

Status CudaDriver::granule_release(Handle handle) {
  const auto key = static_cast<std::uint64_t>(handle);
  const Status status = CALL(cuMemRelease, key);
  if (status != Status::ok) return status;
  const std::lock_guard lock(mutex_);
  bytes_.erase(key);
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

// Undoes what an earlier map() in the range had to leave behind.
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
  {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < count; ++i) {
      const auto found = bytes_.find(static_cast<std::uint64_t>(handles[i]));
      if (found == bytes_.end()) return Status::invalid;
      sizes.push_back(found->second);
      total += found->second;
    }
  }
  if (const Status settled = settle(address, total); settled != Status::ok) return settled;
  const Scope scope(*this);
  if (scope.status() != Status::ok) return scope.status();
  std::uint64_t mapped = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Status status = translate(
        "cuMemMap", cuda_.cuMemMap(address + mapped, sizes[i], 0,
                                   static_cast<CUmemGenericAllocationHandle>(handles[i]), 0));
    if (status != Status::ok) {
      if (mapped && cuda_.cuMemUnmap(address, mapped) != CUDA_SUCCESS) {
        const std::lock_guard lock(mutex_);
        stuck_[address] = mapped;
      }
      return status;
    }
    mapped += sizes[i];
  }
  return Status::ok;
}

Status CudaDriver::unmap(Address address, std::uint64_t bytes) {
  return CALL(cuMemUnmap, CUdeviceptr{address}, bytes);
}

Status CudaDriver::set_access(Address address, std::uint64_t bytes, Access access) {
  const CUmemAccessDesc wanted{{CU_MEM_LOCATION_TYPE_DEVICE, device_},
                               access == Access::none   ? CU_MEM_ACCESS_FLAGS_PROT_NONE
                               : access == Access::read ? CU_MEM_ACCESS_FLAGS_PROT_READ
                                                        : CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  return CALL(cuMemSetAccess, CUdeviceptr{address}, bytes, &wanted, std::size_t{1});
}

// Registered rather than allocated by the driver: exactly the bytes asked for, and about twice as
// fast. Portable, so that every context of the process may copy from it.
Status CudaDriver::pinned_create(std::uint64_t bytes, std::byte** out) {
  if (bytes == 0) return Status::invalid;
  if (lost_.load()) return Status::device_lost;
  std::byte* memory = allocate_touched(bytes);
  if (!memory) return Status::out_of_memory;
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

// CUDA waits without a limit only, so it is asked again and again, at growing intervals: a copy of
// a chunk takes some hundred microseconds, and a thread that spins takes a core from the engine.
Status CudaDriver::event_wait(EventId event, std::chrono::microseconds timeout) {
  using std::chrono::microseconds;
  const auto begin = Clock::now();
  for (microseconds pause{5};; pause = std::min(pause * 2, microseconds(200))) {
    const Status status = event_query(event);
    const auto left = timeout - std::chrono::duration_cast<microseconds>(Clock::now() - begin);
    if (status != Status::not_ready || left <= microseconds(0)) return status;
    std::this_thread::sleep_for(std::min(pause, left));
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

Status CudaDriver::launch(const KernelCall& call, StreamId stream) {
  if (misuse(call)) return Status::invalid;
  if (!module_) return Status::failed;
  const Scope scope(*this);
  if (scope.status() != Status::ok) return scope.status();
  CUfunction function = nullptr;
  const std::string name = kernel_symbol(call);
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = functions_.find(name); found != functions_.end())
      function = found->second;
  }
  if (!function) {
    const Status found = translate("cuModuleGetFunction",
                                   cuda_.cuModuleGetFunction(&function, module_, name.c_str()));
    if (found != Status::ok) return found;
    const std::lock_guard lock(mutex_);
    functions_[name] = function;
  }
  const LaunchShape shape = launch_shape(call);
  return std::visit(
      [&](auto parameter) {
        void* parameters[] = {&parameter};
        return translate("cuLaunchKernel",
                         cuda_.cuLaunchKernel(function, shape.blocks, 1, 1, shape.threads, 1, 1, 0,
                                              stream_of(stream), parameters, nullptr));
      },
      call);
}

}  // namespace

std::shared_ptr<Driver> make_cuda_driver(const CudaOptions& options) {
  return std::make_shared<CudaDriver>(options, cuda::Library(options.library));
}

}  // namespace warmserve
