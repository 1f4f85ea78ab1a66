#include "kernels/kernels.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "kernels/digest_parts.h"
#include "kernels/weight_kernels.inl"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace warmserve {
namespace {

constexpr const char* kSymbols[] = {"ws_granule_digest", "ws_cast", "ws_gather_rows"};
static_assert(std::size(kSymbols) == std::variant_size_v<KernelCall>);

// The kernels count positions in a granule in 32 bits.
constexpr std::uint64_t kMaxDigestBytes = 16 * kGiB;

std::uint64_t scale_bytes(const CastCall& call) {
  if (call.scales == 0) return 0;
  return sizeof(float) * ceil_div(ceil_div(call.count, call.columns), call.block_rows) *
         ceil_div(call.columns, call.block_columns);
}

std::uint64_t gathered_from(const GatherCall& call) {
  if (call.rows == 0 || call.row_bytes == 0) return 0;
  return (call.rows - 1) * call.pitch + call.row_bytes;
}

// Returns whether a * b + c bytes fit in an address space.
bool fits(std::uint64_t a, std::uint64_t b, std::uint64_t c = 0) {
  std::uint64_t product, sum;
  return !__builtin_mul_overflow(a, b, &product) && !__builtin_add_overflow(product, c, &sum) &&
         sum >> 63 == 0;
}

Misuse misuse_of(const DigestCall& call) {
  if (call.granule_bytes == 0) return Misuse::empty_granules;
  if (call.granule_bytes > kMaxDigestBytes && call.bytes > kMaxDigestBytes)
    return Misuse::digest_too_long;
  if (call.out % 8 != 0) return Misuse::misaligned_digests;
  return fits(call.bytes, 1) ? Misuse::none : Misuse::too_many_bytes;
}

Misuse misuse_of(const CastCall& call) {
  const auto [from, to] = widths(call.kind);
  if (from == 0) return Misuse::no_such_cast;
  if (!fits(call.count, std::max(from, to))) return Misuse::too_many_elements;
  if (call.scales == 0)
    return call.columns == 0 && call.block_rows == 0 && call.block_columns == 0
               ? Misuse::none
               : Misuse::missing_scales;
  if (from != 1) return Misuse::needless_scales;
  if (call.scales % 4 != 0) return Misuse::misaligned_scales;
  if (call.columns == 0 || call.block_rows == 0 || call.block_columns == 0)
    return Misuse::empty_blocks;
  return call.count % call.columns == 0 ? Misuse::none : Misuse::cut_rows;
}

Misuse misuse_of(const GatherCall& call) {
  if (call.pitch < call.row_bytes) return Misuse::short_pitch;
  if (call.rows != 0 && !fits(call.rows - 1, call.pitch, call.row_bytes))
    return Misuse::too_many_bytes;
  return Misuse::none;
}

void add_touched(const DigestCall& call, std::vector<Touched>* all) {
  all->push_back({call.from, call.bytes, false});
  all->push_back({call.out, 8 * ceil_div(call.bytes, call.granule_bytes), true});
}
void add_touched(const CastCall& call, std::vector<Touched>* all) {
  const auto [from, to] = widths(call.kind);
  all->push_back({call.from, call.count * from, false});
  all->push_back({call.to, call.count * to, true});
  if (call.scales != 0) all->push_back({call.scales, scale_bytes(call), false});
}
void add_touched(const GatherCall& call, std::vector<Touched>* all) {
  all->push_back({call.from, gathered_from(call), false});
  all->push_back({call.to, call.rows * call.row_bytes, true});
}

// Returns whether the ranges overlap and one is written: the result would depend on thread order.
bool overlaps(const Touched& a, const Touched& b) {
  return (a.write || b.write) && a.address < b.address + b.bytes && b.address < a.address + a.bytes;
}

void rebase(DigestCall* call, std::span<const Address> to) {
  call->from = to[0];
  call->out = to[1];
}
void rebase(CastCall* call, std::span<const Address> to) {
  call->from = to[0];
  call->to = to[1];
  if (call->scales != 0) call->scales = to[2];
}
void rebase(GatherCall* call, std::span<const Address> to) {
  call->from = to[0];
  call->to = to[1];
}

// The policy for the CPU, which has one thread.
struct CpuThread {
  static constexpr std::uint64_t kRun = bodies::kAll;
  static constexpr std::uint64_t thread = 0, threads = 1, block = 0, blocks = 1, in_block = 0,
                                 block_size = 1;
  static bool sum(std::uint64_t*) { return true; }
  static std::uint64_t piece(std::uint64_t row_bytes, std::uint64_t) { return row_bytes; }
  static void copy(std::byte* to, const std::byte* from, std::uint64_t piece, std::uint64_t) {
    std::memcpy(to, from, piece);
  }
};

#ifdef __SSE2__
// The policy for many short rows: memcpy would write them through the cache, and hardware
// prefetchers do not predict them.
struct StreamingThread : CpuThread {
  static constexpr std::uint64_t kLine = 64, kShort = 4 * kKiB, kAhead = 16 * kKiB;
  const std::uintptr_t end;

  static bool suits(const GatherCall& call) {
    return call.row_bytes < kShort && call.row_bytes % kLine == 0 && call.to % 16 == 0 &&
           call.pitch != call.row_bytes && call.rows * call.row_bytes >= 4 * kMiB;
  }
  explicit StreamingThread(const GatherCall& call) : end(call.from + gathered_from(call)) {}
  ~StreamingThread() { _mm_sfence(); }  // makes the writes visible to other threads

  void copy(std::byte* to, const std::byte* from, std::uint64_t piece, std::uint64_t pitch) const {
    const std::uintptr_t next =
        reinterpret_cast<std::uintptr_t>(from) + ceil_div(kAhead, piece) * pitch;
    for (std::uint64_t at = 0; at < piece; at += kLine) {
      if (next < end) _mm_prefetch(reinterpret_cast<const char*>(next + at), _MM_HINT_T0);
      const auto* source = reinterpret_cast<const __m128i*>(from + at);
      auto* target = reinterpret_cast<__m128i*>(to + at);
      for (int i = 0; i < 4; ++i) _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
    }
  }
};
#endif

void gather(const GatherCall& call) {
#ifdef __SSE2__
  if (StreamingThread::suits(call)) {
    StreamingThread thread(call);
    return bodies::run(thread, call);
  }
#endif
  CpuThread thread;
  bodies::run(thread, call);
}

[[gnu::always_inline]] inline void compute(const KernelCall& call) {
  CpuThread thread;
  if (const auto* digest = std::get_if<DigestCall>(&call)) bodies::run(thread, *digest);
  if (const auto* cast = std::get_if<CastCall>(&call)) bodies::run(thread, *cast);
}

// A piece of a granule. Its share of the digest goes to `sum`.
struct DigestPart {
  const std::byte* from;
  std::uint64_t bytes, first_word;
  std::uint64_t* sum;
};

[[gnu::always_inline]] inline void compute(const DigestPart& part) {
  const std::uint64_t words = part.bytes / 4;
  *part.sum = bodies::digest_words<CpuThread>(part.from, part.first_word, words) +
              bodies::digest_tail(part.from + 4 * words, part.bytes % 4, part.first_word + words);
}

// The same bodies, compiled once for each kind of processor. target_clones would not do: its
// resolver would run before a sanitizer is initialised.
struct Compute {
  void (*call)(const KernelCall&);
  void (*digest)(const DigestPart&);
};
void compute_anywhere(const KernelCall& call) { compute(call); }
void digest_anywhere(const DigestPart& part) { compute(part); }
constexpr Compute kAnywhere{compute_anywhere, digest_anywhere};
#ifdef __x86_64__
[[gnu::target("avx2")]] void compute_avx2(const KernelCall& call) { compute(call); }
[[gnu::target("avx2")]] void digest_avx2(const DigestPart& part) { compute(part); }
constexpr Compute kAvx2{compute_avx2, digest_avx2};
[[gnu::target("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")]]
void compute_avx512(const KernelCall& call) {
  compute(call);
}
[[gnu::target("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")]]
void digest_avx512(const DigestPart& part) {
  compute(part);
}
constexpr Compute kAvx512{compute_avx512, digest_avx512};

Compute choose_compute() {
  if (!__builtin_cpu_supports("avx2")) return kAnywhere;
  for (const bool has :
       {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
        __builtin_cpu_supports("avx512dq") != 0, __builtin_cpu_supports("avx512vl") != 0})
    if (!has) return kAvx2;
  return kAvx512;
}
#else
Compute choose_compute() { return kAnywhere; }
#endif

const Compute& computing() {
  static const Compute here = choose_compute();
  return here;
}

}  // namespace

Widths widths(CastKind kind) noexcept {
  switch (kind) {
    case CastKind::f32_to_bf16:
    case CastKind::f32_to_f16: return {4, 2};
    case CastKind::f16_to_bf16:
    case CastKind::bf16_to_f16: return {2, 2};
    case CastKind::f16_to_f32:
    case CastKind::bf16_to_f32: return {2, 4};
    case CastKind::f8_e4m3_to_bf16:
    case CastKind::f8_e5m2_to_bf16: return {1, 2};
  }
  return {0, 0};
}

const char* kernel_symbol(const KernelCall& call) noexcept { return kSymbols[call.index()]; }

bool parse_kernel(const char* symbol, const void* parameter, KernelCall* out) noexcept {
  const auto parse = [&]<class Call>(Call call) {
    std::memcpy(&call, parameter, sizeof(Call));
    *out = call;
    return true;
  };
  const std::string_view name = symbol;
  if (name == kSymbols[0]) return parse(DigestCall{});
  if (name == kSymbols[1]) return parse(CastCall{});
  if (name == kSymbols[2]) return parse(GatherCall{});
  return false;
}

std::vector<Touched> touched(const KernelCall& call) {
  std::vector<Touched> all;
  std::visit([&](const auto& one) { add_touched(one, &all); }, call);
  return all;
}

Misuse misuse(const KernelCall& call) noexcept {
  const Misuse found = std::visit([](const auto& one) { return misuse_of(one); }, call);
  if (found != Misuse::none) return found;
  const std::vector<Touched> all = touched(call);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (all[i].address + all[i].bytes < all[i].address) return Misuse::past_the_end;
    for (std::size_t j = 0; j < i; ++j)
      if (overlaps(all[i], all[j])) return Misuse::overlap;
  }
  return Misuse::none;
}

const char* text_of(Misuse misuse) noexcept {
  switch (misuse) {
    case Misuse::none: return "nothing";
    case Misuse::empty_granules: return "granules of 0 bytes";
    case Misuse::digest_too_long: return "a digest of more than 16 GiB";
    case Misuse::misaligned_digests:
      return "digests are written to an address that is not a multiple of 8";
    case Misuse::too_many_bytes: return "too many bytes";
    case Misuse::no_such_cast: return "no such cast";
    case Misuse::too_many_elements: return "too many elements";
    case Misuse::missing_scales: return "the shape of scales, but no scales";
    case Misuse::needless_scales: return "only fp8 has scales";
    case Misuse::misaligned_scales: return "scales at an address that is not a multiple of 4";
    case Misuse::empty_blocks: return "scales for rows or blocks without elements";
    case Misuse::cut_rows: return "the elements do not fill whole rows";
    case Misuse::short_pitch: return "rows that overlap: the pitch is less than a row";
    case Misuse::past_the_end: return "past the end of all addresses";
    case Misuse::overlap: return "the bytes written overlap the bytes read";
  }
  return "";
}

LaunchShape launch_shape(const KernelCall& call) noexcept {
  // More blocks than ever run at once; for larger calls, each block takes several shares.
  constexpr std::uint64_t kMaxBlocks = 1 << 16;
  std::uint64_t blocks = 0;
  unsigned threads = 256;
  if (const auto* digest = std::get_if<DigestCall>(&call)) {
    blocks = ceil_div(digest->bytes, digest->granule_bytes);
    threads = 1024;
  } else if (const auto* cast = std::get_if<CastCall>(&call)) {
    blocks = ceil_div(cast->count, std::uint64_t{8} * threads);
  } else if (const auto* gather = std::get_if<GatherCall>(&call)) {
    blocks = ceil_div(gather->rows * gather->row_bytes, std::uint64_t{16} * threads);
  }
  return {static_cast<unsigned>(std::clamp<std::uint64_t>(blocks, 1, kMaxBlocks)), threads};
}

void run_on_cpu(const KernelCall& call) noexcept {
  if (const auto* one = std::get_if<GatherCall>(&call)) return gather(*one);
  computing().call(call);
}

std::uint64_t digest_part(const std::byte* from, std::uint64_t bytes,
                          std::uint64_t first_word) noexcept {
  std::uint64_t sum = 0;
  computing().digest({from, bytes, first_word, &sum});
  return sum;
}

std::uint64_t digest_of_parts(std::uint64_t sum, std::uint64_t bytes) noexcept {
  return bodies::digest_finish(sum, bytes);
}

KernelCall rebased(const KernelCall& call, std::span<const Address> addresses) noexcept {
  KernelCall moved = call;
  std::visit([&](auto& one) { rebase(&one, addresses); }, moved);
  return moved;
}

}  // namespace warmserve
