// The bodies of the weight kernels, for every thread on every device.
//
// nvcc compiles them in weight_kernels.cu, and the C++ compiler in kernels.cpp, where one thread
// runs them and their loops become vector code. A "threads" policy defines the caller's share of
// the work:
//
//   kRun                    number of neighbouring elements a thread takes at once; kAll on the CPU
//   thread, threads         index of the thread, number of threads
//   block, blocks           index of the block, number of blocks
//   in_block, block_size    index of the thread in its block, threads per block
//   sum(&value)             adds over the block; true in the one thread that receives the sum
//   piece(row, alignment)   number of bytes of a row to copy at once: a divisor of row
//   copy(to, from, piece, pitch)  copies piece bytes; the next copy probably reads from + pitch
//
// Results are bit-identical under every policy: floating point is used only if it is exact or
// rounds once, and sums are integer sums.
//
// The three kernels are in one file, because the digest reads and the casts write by the same packs
// and all take their share of the work from the same policy.
#pragma once

#include <cstring>

#include "kernels/kernels.h"

#ifdef __CUDACC__
#define WARMSERVE_BODY __device__ __forceinline__
#define WARMSERVE_RARE_LOOP \
  _Pragma("unroll 1")  // the rare unaligned case should not dominate the code size
#else
#define WARMSERVE_BODY \
  __attribute__((always_inline)) inline  // inlined into the code for each kind of processor
#define WARMSERVE_RARE_LOOP
#endif

namespace warmserve::bodies {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr u64 kAll = ~u64{0};

template <class T>
WARMSERVE_BODY T load(const std::byte* at) {  // at any address
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}
template <class T>
WARMSERVE_BODY void store(std::byte* at, T value) {
  std::memcpy(at, &value, sizeof(T));
}

// Values that a GPU reads or writes by one instruction per 16 bytes if the address is aligned.
template <class T, u64 N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};
template <class P>
WARMSERVE_BODY bool aligned(const void* at) {
  return reinterpret_cast<Address>(at) % alignof(P) == 0;
}
template <class P>
WARMSERVE_BODY P load_aligned(const std::byte* at) {
  P pack;
  std::memcpy(&pack, __builtin_assume_aligned(at, alignof(P)), sizeof(P));
  return pack;
}
template <class P>
WARMSERVE_BODY void store_aligned(std::byte* at, const P& pack) {
  std::memcpy(__builtin_assume_aligned(at, alignof(P)), &pack, sizeof(P));
}

WARMSERVE_BODY std::byte* memory(Address address) { return reinterpret_cast<std::byte*>(address); }
WARMSERVE_BODY u64 least(u64 a, u64 b) { return a < b ? a : b; }
WARMSERVE_BODY u64 divide(u64 a, u64 b) {  // a GPU divides 32-bit numbers several times faster
  return (a | b) >> 32 ? a / b : static_cast<u32>(a) / static_cast<u32>(b);
}
WARMSERVE_BODY u64 divide_up(u64 a, u64 b) { return a / b + (a % b != 0); }

// Digest ------------------------------------------------------------------------------------------
//
// A granule of n bytes is read as little-endian 32-bit words w[0], w[1], ..., the last one padded
// with zeros. With x[i] = i * 0x9E3779B1 modulo 2^32, and all other arithmetic modulo 2^64:
//
//   sum    = n * 0x9E3779B97F4A7C15 + the sum over i of (w[i] ^ x[i] ^ (x[i] >> 16))^2
//   digest = finish(sum), which is injective
//
// Different numbers below 2^32 have different squares, so a change within one word always changes
// the digest. So does a change of the length alone. Other changes may go unnoticed by chance: with
// a probability of about 2^-60 for swapped or stale chunks, and 2^-31 for two words that swap
// places and differ only in the sign bit. The digest is no defence against an adversary who chooses
// the bytes. It depends on a granule's content, not on its address.

constexpr u32 kPositionFactor = 0x9E3779B1;

// Returns a word's term of the sum; x is the word's position times kPositionFactor.
WARMSERVE_BODY u64 digest_term(u32 word, u32 x) {
  const u32 mixed = word ^ x ^ (x >> 16);
  return u64{mixed} * mixed;
}

WARMSERVE_BODY u64 digest_finish(u64 sum, u64 bytes) {
  sum += bytes * 0x9E3779B97F4A7C15;
  sum = (sum ^ (sum >> 32)) * 0xD6E8FEB86659FD93;
  sum = (sum ^ (sum >> 32)) * 0xD6E8FEB86659FD93;
  return sum ^ (sum >> 32);
}

template <class Threads>
WARMSERVE_BODY u64 digest_words(const std::byte* from, u64 first, u64 count) {
  u32 x = static_cast<u32>(first) * kPositionFactor;
  u64 sum = 0;
  if constexpr (Threads::kRun != kAll) {
    using Words = Pack<u32, 4>;
    if (count % 4 == 0 && aligned<Words>(from)) {
      for (u64 i = 0; i < count; i += 4) {
        const Words words = load_aligned<Words>(from + 4 * i);
        for (const u32 word : words.values) {
          sum += digest_term(word, x);
          x += kPositionFactor;
        }
      }
      return sum;
    }
  }
  WARMSERVE_RARE_LOOP
  for (u64 i = 0; i < count; ++i) {
    sum += digest_term(load<u32>(from + 4 * i), x);
    x += kPositionFactor;
  }
  return sum;
}

// Returns the term of a last word of fewer than 4 bytes, at position `word`.
WARMSERVE_BODY u64 digest_tail(const std::byte* from, u64 bytes, u64 word) {
  if (bytes == 0) return 0;
  u32 last = 0;
  for (u64 i = 0; i < bytes; ++i) last |= load<u8>(from + i) << (8 * i);
  return digest_term(last, static_cast<u32>(word) * kPositionFactor);
}

// Returns this thread's share of the sum of one granule.
template <class Threads>
WARMSERVE_BODY u64 digest_share(const Threads& threads, const std::byte* from, u64 bytes) {
  const u64 words = bytes / 4;
  const u64 runs = divide_up(words, Threads::kRun);
  u64 sum = 0;
  for (u64 run = threads.in_block; run < runs; run += threads.block_size) {
    const u64 first = run * Threads::kRun;
    sum += digest_words<Threads>(from + 4 * first, first, least(Threads::kRun, words - first));
  }
  if (threads.in_block == 0) sum += digest_tail(from + 4 * words, bytes % 4, words);
  return sum;
}

template <class Threads>
WARMSERVE_BODY void run(Threads& threads, const DigestCall& call) {
  const u64 granules = divide_up(call.bytes, call.granule_bytes);
  for (u64 granule = threads.block; granule < granules; granule += threads.blocks) {
    const u64 begin = granule * call.granule_bytes;
    const u64 bytes = least(call.granule_bytes, call.bytes - begin);
    u64 sum = digest_share(threads, memory(call.from) + begin, bytes);
    if (threads.sum(&sum)) store(memory(call.out) + 8 * granule, digest_finish(sum, bytes));
  }
}

// Casts -------------------------------------------------------------------------------------------
//
// Values are passed as their bits. A NaN becomes the positive quiet NaN without payload, which is
// the same on every device; widening to f32 keeps the payload.

WARMSERVE_BODY float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
WARMSERVE_BODY u32 as_bits(float value) { return __builtin_bit_cast(u32, value); }

WARMSERVE_BODY u16 bf16_from_f32(u32 bits) {
  const u32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<u16>(as_float(bits) != as_float(bits) ? 0x7FC0 : rounded);
}

// The floating-point addition rounds. First the value is scaled by 2^2, by way of 2^112, at which
// values beyond the range of f16 become infinite. Then a power of two is added that aligns the last
// bit of the f16 with the last bit of the sum.
WARMSERVE_BODY u16 f16_from_f32(u32 bits) {
  const u32 twice = bits << 1;
  const float scaled = as_float(bits & 0x7FFFFFFF) * 0x1p112f * 0x1p-110f;
  const u32 exponent = twice & 0xFF000000;
  const u32 shift = (exponent < 0x71000000 ? 0x71000000 : exponent) >> 1;
  const u32 sum = as_bits(as_float(shift + 0x07800000) + scaled);
  const u32 value = ((sum >> 13) & 0x7C00) + (sum & 0x0FFF);
  return static_cast<u16>(twice > 0xFF000000 ? 0x7E00 : ((bits >> 16) & 0x8000) | value);
}

// Changes the exponent's bias to that of f32. `magnitude` is a float's bits without the sign,
// shifted so that the mantissa is in its place in an f32; its exponent still has another bias, and
// `rebias` is the difference. Numbers with exponent 0 are subnormal: with the exponent of the
// smallest normal number, they are too large by exactly that number. No operand is an f32
// subnormal, because some processors are set to flush those.
WARMSERVE_BODY u32 with_f32_bias(u32 magnitude, u32 rebias) {
  const u32 smallest = (rebias + 1) << 23;
  const float subnormal = as_float(magnitude + smallest) - as_float(smallest);
  return magnitude < 1u << 23 ? as_bits(subnormal) : magnitude + (rebias << 23);
}

WARMSERVE_BODY u32 f32_from_f16(u32 bits) {
  const u32 magnitude = (bits & 0x7FFF) << 13;
  const u32 finite = with_f32_bias(magnitude, 127 - 15);
  return ((bits & 0x8000) << 16) | (magnitude >= 0x1Fu << 23 ? magnitude | 0x7F800000 : finite);
}

// fp8 to bf16 without floating point, because 16 bits per element are half the work of 32. bf16 can
// represent every fp8 value. For subnormals the mantissa moves up by one bit per leading zero, so
// the bf16 bits as a function of the fp8 bits are a concave piecewise linear function: the minimum
// of the lines of its pieces. The line of normal numbers is the last piece. Each other line has
// twice the slope of the next one, so the code doubles. Zero lies on no line. Masks make the
// selections, because compilers would move a conditional to a place where the elements are wider.
WARMSERVE_BODY u16 all_ones_if(bool condition) {
  return static_cast<u16>(0 - static_cast<u16>(condition));
}
WARMSERVE_BODY u16 lesser(u16 a, u16 b) { return a < b ? a : b; }
WARMSERVE_BODY u16 bf16_from_e4m3(u8 bits) {  // e4m3 has no infinities; all ones is NaN
  const u16 m = bits & 0x7F;
  const u16 line = static_cast<u16>(m << 4);
  u16 number = lesser(line + 118 * 32, line + line + 117 * 32);
  number = lesser(line + 119 * 64, number + number);
  number = lesser(line + 120 * 128, number + number);
  number &= all_ones_if(m != 0);
  number |= all_ones_if(m == 0x7F) & 0x7FC0;
  return number | static_cast<u16>((bits & 0x80) << 8);
}
WARMSERVE_BODY u16 bf16_from_e5m2(u8 bits) {
  const u16 m = bits & 0x7F;
  const u16 line = static_cast<u16>(m << 5);
  u16 number = lesser(line + 111 * 64, line + line + 110 * 64);
  number = lesser(line + 112 * 128, number + number);
  number &= all_ones_if(m != 0);
  number |= all_ones_if(m >= 0x7C) & 0x7F80;  // infinity, or NaN if the mantissa is not 0
  return number | static_cast<u16>((bits & 0x80) << 8);
}
WARMSERVE_BODY u16 with_one_nan(u16 bits) {
  const u16 nan = all_ones_if((bits & 0x7FFF) > 0x7F80);
  return static_cast<u16>((nan & 0x7FC0) | (bits & ~nan));
}

template <class From, class To>
struct Types {
  using Source = From;
  using Target = To;
  static WARMSERVE_BODY To unscaled(To bits) { return bits; }
};
struct F32ToBf16 : Types<u32, u16> {
  static WARMSERVE_BODY u16 of(u32 bits) { return bf16_from_f32(bits); }
};
struct F32ToF16 : Types<u32, u16> {
  static WARMSERVE_BODY u16 of(u32 bits) { return f16_from_f32(bits); }
};
struct F16ToF32 : Types<u16, u32> {
  static WARMSERVE_BODY u32 of(u16 bits) { return f32_from_f16(bits); }
};
struct F16ToBf16 : Types<u16, u16> {
  static WARMSERVE_BODY u16 of(u16 bits) { return bf16_from_f32(f32_from_f16(bits)); }
};
struct Bf16ToF32 : Types<u16, u32> {
  static WARMSERVE_BODY u32 of(u16 bits) { return u32{bits} << 16; }
};
struct Bf16ToF16 : Types<u16, u16> {
  static WARMSERVE_BODY u16 of(u16 bits) { return f16_from_f32(u32{bits} << 16); }
};
struct E4m3ToBf16 : Types<u8, u16> {
  static WARMSERVE_BODY u16 of(u8 bits) { return bf16_from_e4m3(bits); }
  static WARMSERVE_BODY u16 unscaled(u16 bits) { return with_one_nan(bits); }
};
struct E5m2ToBf16 : Types<u8, u16> {
  static WARMSERVE_BODY u16 of(u8 bits) { return bf16_from_e5m2(bits); }
  static WARMSERVE_BODY u16 unscaled(u16 bits) { return with_one_nan(bits); }
};

// The step after the conversion, for element i of a run. Elements to scale are exact bf16 values.
WARMSERVE_BODY u16 scaled(u16 bits, float scale) {
  return bf16_from_f32(as_bits(as_float(u32{bits} << 16) * scale));
}
template <class Kind>
struct Unscaled {
  WARMSERVE_BODY typename Kind::Target operator()(typename Kind::Target bits, u64) const {
    return Kind::unscaled(bits);
  }
};
struct ScaledAlike {
  float scale;
  WARMSERVE_BODY u16 operator()(u16 bits, u64) const { return scaled(bits, scale); }
};
struct ScaledEach {
  const std::byte* scales;
  WARMSERVE_BODY u16 operator()(u16 bits, u64 i) const {
    return scaled(bits, load<float>(scales + 4 * i));
  }
};

template <class Threads, class Kind, class Scale>
WARMSERVE_BODY void cast_run(const std::byte* __restrict from, std::byte* __restrict to, u64 count,
                             const Scale scale) {
  using Source = typename Kind::Source;
  using Target = typename Kind::Target;
  if constexpr (Threads::kRun != kAll) {
    using Sources = Pack<Source, Threads::kRun>;
    using Targets = Pack<Target, Threads::kRun>;
    if (count == Threads::kRun && aligned<Sources>(from) && aligned<Targets>(to)) {
      const Sources sources = load_aligned<Sources>(from);
      Targets targets;
      for (u64 i = 0; i < Threads::kRun; ++i)
        targets.values[i] = scale(Kind::of(sources.values[i]), i);
      store_aligned(to, targets);
      return;
    }
  }
  WARMSERVE_RARE_LOOP
  for (u64 i = 0; i < count; ++i)
    store<Target>(to + sizeof(Target) * i,
                  scale(Kind::of(load<Source>(from + sizeof(Source) * i)), i));
}

// Casts elements [begin, end) in runs. A run has one scale, or one scale for each column.
template <class Threads, class Kind>
WARMSERVE_BODY void cast_scaled(const CastCall& call, u64 begin, u64 end) {
  const std::byte* from = memory(call.from);
  std::byte* to = memory(call.to);
  const u64 columns = call.columns;
  const u64 blocks = divide_up(columns, call.block_columns);
  for (u64 i = begin; i < end;) {
    const u64 row = divide(i, columns), column = i - row * columns;
    const u64 block_row = divide(row, call.block_rows);
    const std::byte* scales = memory(call.scales) + 4 * block_row * blocks;
    const std::byte* source = from + sizeof(typename Kind::Source) * i;
    std::byte* target = to + sizeof(typename Kind::Target) * i;
    u64 count = least(end - i, columns - column);
    if (blocks > 1 && call.block_columns == 1) {
      cast_run<Threads, Kind>(source, target, count, ScaledEach{scales + 4 * column});
    } else {
      if (blocks == 1) {  // then the rows of a block are contiguous
        const u64 rows = (block_row + 1) * call.block_rows - row;
        count = rows > divide(end - i, columns) ? end - i : rows * columns - column;
      } else {
        const u64 block = divide(column, call.block_columns);
        scales += 4 * block;
        count = least(count, (block + 1) * call.block_columns - column);
      }
      cast_run<Threads, Kind>(source, target, count, ScaledAlike{load<float>(scales)});
    }
    i += count;
  }
}

template <class Kind, class Threads>
WARMSERVE_BODY void cast_all(const Threads& threads, const CastCall& call) {
  const u64 runs = divide_up(call.count, Threads::kRun);
  for (u64 run = threads.thread; run < runs; run += threads.threads) {
    const u64 first = run * Threads::kRun;
    const u64 count = least(Threads::kRun, call.count - first);
    if constexpr (sizeof(typename Kind::Source) == 1) {
      if (call.scales != 0) {
        cast_scaled<Threads, Kind>(call, first, first + count);
        continue;
      }
    }
    cast_run<Threads, Kind>(memory(call.from) + sizeof(typename Kind::Source) * first,
                            memory(call.to) + sizeof(typename Kind::Target) * first, count,
                            Unscaled<Kind>{});
  }
}

template <class Threads>
WARMSERVE_BODY void run(Threads& threads, const CastCall& call) {
  switch (call.kind) {
    case CastKind::f32_to_bf16: return cast_all<F32ToBf16>(threads, call);
    case CastKind::f32_to_f16: return cast_all<F32ToF16>(threads, call);
    case CastKind::f16_to_f32: return cast_all<F16ToF32>(threads, call);
    case CastKind::f16_to_bf16: return cast_all<F16ToBf16>(threads, call);
    case CastKind::bf16_to_f32: return cast_all<Bf16ToF32>(threads, call);
    case CastKind::bf16_to_f16: return cast_all<Bf16ToF16>(threads, call);
    case CastKind::f8_e4m3_to_bf16: return cast_all<E4m3ToBf16>(threads, call);
    case CastKind::f8_e5m2_to_bf16: return cast_all<E5m2ToBf16>(threads, call);
  }
}

// Gather ------------------------------------------------------------------------------------------

// Returns the widest access, up to 16 bytes, that divides every number or-ed into `alignment`.
WARMSERVE_BODY u64 widest_piece(u64 alignment) {
  alignment |= 16;
  return alignment & -alignment;
}

template <class Threads>
WARMSERVE_BODY void run(Threads& threads, const GatherCall& call) {
  if (call.row_bytes == 0) return;
  const u64 alignment = call.from | call.to | call.row_bytes | call.pitch;
  const u64 piece = threads.piece(call.row_bytes, alignment);
  const u64 pieces = divide(call.row_bytes, piece);
  const std::byte* from = memory(call.from);
  std::byte* to = memory(call.to);
  for (u64 i = threads.thread; i < call.rows * pieces; i += threads.threads) {
    const u64 row = divide(i, pieces);
    threads.copy(to + i * piece, from + row * call.pitch + (i - row * pieces) * piece, piece,
                 call.pitch);
  }
}

}  // namespace warmserve::bodies
