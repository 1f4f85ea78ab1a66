// The weight kernels as values: what to call, what it touches, and its body on the CPU.
//
// One source, weight_kernels.inl, holds the bodies; nvcc compiles it for the GPU and the C++
// compiler for the host. Addresses are the device's; run_on_cpu() wants addresses that the CPU can
// read and write.
#pragma once

#include <span>
#include <variant>
#include <vector>

#include "base/types.h"

namespace warmserve {

// A digest of each granule's worth of bytes, so that content on the device is checked without
// copying it back. out[i] is of bytes [i * granule_bytes, ...) of the range; the last may be short.
struct DigestCall {
  Address from = 0;
  std::uint64_t bytes = 0, granule_bytes = 0;
  Address out = 0;  // ceil(bytes / granule_bytes) uint64, 8-aligned; may be pinned host memory
};

enum class CastKind : std::uint32_t {
  f32_to_bf16,
  f32_to_f16,
  f16_to_f32,
  f16_to_bf16,
  bf16_to_f32,
  bf16_to_f16,
  f8_e4m3_to_bf16,
  f8_e5m2_to_bf16,
};
// Bytes of an element before and after; {0, 0} for a kind that is none.
struct Widths {
  std::uint64_t from, to;
};
Widths widths(CastKind kind) noexcept;
// to[i] = from[i] converted, rounded to nearest even; fp8 is multiplied by its scale first, in f32.
// The matrix has rows of `columns`; scales[r / block_rows][c / block_columns], rows of
// ceil(columns / block_columns), is the scale of element (r, c).
struct CastCall {
  CastKind kind{};
  Address from = 0, to = 0;
  std::uint64_t count = 0;
  Address scales = 0;                                            // f32; 0: all 1
  std::uint64_t columns = 0, block_rows = 0, block_columns = 0;  // with scales alone
};

// to[r] = the row_bytes at from + r * pitch: a column-parallel shard out of a row-major matrix.
struct GatherCall {
  Address from = 0, to = 0;
  std::uint64_t rows = 0, row_bytes = 0, pitch = 0;  // pitch >= row_bytes
};

using KernelCall = std::variant<DigestCall, CastCall, GatherCall>;

// The name of the GPU function, in the order of the variant: "ws_granule_digest", ...; each takes
// its struct above by value as its one parameter.
const char* kernel_symbol(const KernelCall& call) noexcept;
// What kernel_symbol says, from that parameter; false for a name that is none.
bool parse_kernel(const char* symbol, const void* parameter, KernelCall* out) noexcept;

struct Touched {
  Address address;
  std::uint64_t bytes;
  bool write;
};
// All that the call reads and writes; for a gather the rows alone are read, given as one range from
// the first byte to the last.
std::vector<Touched> touched(const KernelCall& call);
// What is wrong with it.
enum class Misuse {
  none,
  empty_granules,
  digest_too_long,
  misaligned_digests,
  too_many_bytes,
  no_such_cast,
  too_many_elements,
  missing_scales,
  needless_scales,
  misaligned_scales,
  empty_blocks,
  cut_rows,
  short_pitch,
  past_the_end,
  overlap
};
Misuse misuse(const KernelCall& call) noexcept;
const char* text_of(Misuse misuse) noexcept;

struct LaunchShape {
  unsigned blocks, threads;
};
LaunchShape launch_shape(const KernelCall& call) noexcept;

void run_on_cpu(const KernelCall& call) noexcept;
// As touched() orders them, the call with other addresses in their place.
KernelCall rebased(const KernelCall& call, std::span<const Address> addresses) noexcept;

}  // namespace warmserve
