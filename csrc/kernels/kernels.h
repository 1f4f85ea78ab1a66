// The weight kernels as values: the call, the memory it touches, and its execution on the CPU.
//
// One source, weight_kernels.inl, holds the bodies. nvcc compiles it for the GPU and the C++
// compiler for the host. Addresses are device addresses; run_on_cpu() needs addresses that the CPU
// can read and write.
#pragma once

#include <span>
#include <variant>
#include <vector>

#include "base/types.h"

namespace warmserve {

// Computes a digest of each granule_bytes bytes of a range, so that content on the device can be
// checked without copying it back. out[i] covers the bytes from i * granule_bytes on; the last
// piece may be short.
struct DigestCall {
  Address from = 0;
  std::uint64_t bytes = 0, granule_bytes = 0;
  Address out = 0;  // ceil(bytes / granule_bytes) uint64, 8-byte aligned; may be pinned memory
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
// Bytes of an element before and after a cast; {0, 0} for an invalid kind.
struct Widths {
  std::uint64_t from, to;
};
Widths widths(CastKind kind) noexcept;
// Converts elements: to[i] = from[i], rounded to nearest even. fp8 elements are first multiplied by
// their scale, in f32. With scales, the elements form a matrix with `columns` columns.
// scales[r / block_rows][c / block_columns] is the scale of the element in row r and column c; a
// row of scales has ceil(columns / block_columns) values.
struct CastCall {
  CastKind kind{};
  Address from = 0, to = 0;
  std::uint64_t count = 0;
  Address scales = 0;                                            // f32; 0: all scales are 1
  std::uint64_t columns = 0, block_rows = 0, block_columns = 0;  // only with scales
};

// Copies `rows` rows of row_bytes bytes: row r begins at from + r * pitch and is written to
// to + r * row_bytes. It extracts a column-parallel shard from a row-major matrix.
struct GatherCall {
  Address from = 0, to = 0;
  std::uint64_t rows = 0, row_bytes = 0, pitch = 0;  // pitch >= row_bytes
};

using KernelCall = std::variant<DigestCall, CastCall, GatherCall>;

// Returns the name of the GPU function, such as "ws_granule_digest". Its one parameter is the
// call's struct, by value.
const char* kernel_symbol(const KernelCall& call) noexcept;
// Restores a call from its function name and that parameter. Returns false for an unknown name.
bool parse_kernel(const char* symbol, const void* parameter, KernelCall* out) noexcept;

struct Touched {
  Address address;
  std::uint64_t bytes;
  bool write;
};
// Returns the ranges that the call reads and writes. A gather reads only its rows, but they count
// as one range from the first byte to the last.
std::vector<Touched> touched(const KernelCall& call);
// The reason why a call is invalid.
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
// Returns the call with other addresses, in the order of touched().
KernelCall rebased(const KernelCall& call, std::span<const Address> addresses) noexcept;

}  // namespace warmserve
