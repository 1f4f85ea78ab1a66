// The entry points of the weight kernels on a GPU. weight_kernels.inl has their bodies.
#include "kernels/weight_kernels.inl"

namespace warmserve {
namespace {

// One thread of a grid, whose blocks consist of whole warps.
struct GpuThread {
  static constexpr std::uint64_t kRun = 8;
  std::uint64_t thread = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  std::uint64_t threads = std::uint64_t{gridDim.x} * blockDim.x;
  std::uint64_t block = blockIdx.x, blocks = gridDim.x;
  std::uint32_t in_block = threadIdx.x, block_size = blockDim.x;

  __device__ bool sum(std::uint64_t* value) {
    __shared__ unsigned long long of_warp[32];
    unsigned long long total = *value;
    for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_down_sync(~0u, total, lanes);
    if (in_block % 32 == 0) of_warp[in_block / 32] = total;
    __syncthreads();
    if (in_block == 0)
      for (unsigned warp = 1; warp < block_size / 32; ++warp) total += of_warp[warp];
    __syncthreads();  // the next sum writes of_warp
    *value = total;
    return in_block == 0;
  }

  __device__ std::uint64_t piece(std::uint64_t, std::uint64_t alignment) const {
    return bodies::widest_piece(alignment);
  }

  template <class T>
  static __device__ void copy_one(std::byte* to, const std::byte* from) {
    *reinterpret_cast<T*>(to) = *reinterpret_cast<const T*>(from);
  }
  __device__ void copy(std::byte* to, const std::byte* from, std::uint64_t piece,
                       std::uint64_t) const {
    switch (piece) {
      case 16: return copy_one<uint4>(to, from);
      case 8: return copy_one<uint2>(to, from);
      case 4: return copy_one<std::uint32_t>(to, from);
      case 2: return copy_one<std::uint16_t>(to, from);
      default: return copy_one<std::uint8_t>(to, from);
    }
  }
};

template <class Call>
__device__ void run(const Call& call) {
  GpuThread thread;
  bodies::run(thread, call);
}

}  // namespace
}  // namespace warmserve

extern "C" {

__global__ void __launch_bounds__(1024) ws_granule_digest(const warmserve::DigestCall call) {
  warmserve::run(call);
}
__global__ void __launch_bounds__(256) ws_cast(const warmserve::CastCall call) {
  warmserve::run(call);
}
__global__ void __launch_bounds__(256) ws_gather_rows(const warmserve::GatherCall call) {
  warmserve::run(call);
}
}
