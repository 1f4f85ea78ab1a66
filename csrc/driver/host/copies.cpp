#include "driver/host/copies.h"

#include <cstring>

#include "base/types.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace warmserve {
namespace {

#ifdef __SSE2__
constexpr std::uint64_t kLine = 64;
constexpr std::uint64_t kShort = 256 * kKiB;  // up to here the caches help
constexpr std::uint64_t kAhead = 512;         // bytes from the line that is copied to the next read

// Copies whole lines to an aligned address.
void copy_lines(std::byte* to, const std::byte* from, std::uint64_t bytes) noexcept {
  for (std::uint64_t at = 0; at < bytes; at += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(from + at + kAhead), _MM_HINT_NTA);
    const auto* source = reinterpret_cast<const __m128i*>(from + at);
    auto* target = reinterpret_cast<__m128i*>(to + at);
    const __m128i line[] = {_mm_loadu_si128(source), _mm_loadu_si128(source + 1),
                            _mm_loadu_si128(source + 2), _mm_loadu_si128(source + 3)};
    for (int i = 0; i < 4; ++i) _mm_stream_si128(target + i, line[i]);
  }
  _mm_sfence();  // makes the writes visible to other threads
}
#endif

}  // namespace

void copy_past_caches(std::byte* to, const std::byte* from, std::uint64_t bytes) noexcept {
#ifdef __SSE2__
  if (bytes > kShort) {
    const std::uint64_t before = -reinterpret_cast<std::uintptr_t>(to) % kLine;
    const std::uint64_t lines = (bytes - before) / kLine * kLine;
    std::memcpy(to, from, before);
    copy_lines(to + before, from + before, lines);
    std::memcpy(to + before + lines, from + before + lines, bytes - before - lines);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace warmserve
