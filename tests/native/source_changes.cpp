// Files that are read in pieces, truncated, replaced or touched: a load gives the right bytes or an
// error.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "fixtures.h"

namespace {

// Replaces preadv for the next reads; null: the real one. Changed only while no thread reads.
using Read = std::function<ssize_t(int, const iovec*, int, off_t)>;
Read read_as;

ssize_t real_preadv(int descriptor, const iovec* vectors, int count, off_t offset) {
  return ::syscall(SYS_preadv, descriptor, vectors, count, offset, off_t{0});
}

}  // namespace

// Overrides the C library's function.
extern "C" ssize_t preadv(int descriptor, const iovec* vectors, int count, off_t offset) {
  return (read_as ? read_as : real_preadv)(descriptor, vectors, count, offset);
}

namespace warmserve {
namespace {

struct ReadsGo {
  explicit ReadsGo(Read as) { read_as = std::move(as); }
  ~ReadsGo() { read_as = nullptr; }
};

// A file of `bytes` known bytes that contains one layer.
struct Scattered {
  explicit Scattered(std::uint64_t bytes) : file(1, {bytes}) { files.push_back(file.open()); }

  std::vector<std::byte> content() const {
    std::vector<std::byte> all(file.shapes()[0].bytes);
    CHECK(real_preadv(files[0].descriptor(), std::array{iovec{all.data(), all.size()}}.data(), 1,
                      0) == static_cast<ssize_t>(all.size()));
    return all;
  }
  // Reads the layer's bytes into blocks of `block_bytes` and joins the blocks.
  std::vector<std::byte> read(const LayerSource& source, std::uint64_t begin, std::uint64_t end,
                              std::uint64_t block_bytes) const {
    const std::uint64_t first = begin / block_bytes, last = ceil_div(end, block_bytes);
    std::vector<std::vector<std::byte>> blocks(last - first);
    Destination destination{first * block_bytes, block_bytes, {}};
    for (auto& block : blocks) {
      block.assign(block_bytes, std::byte{0xEE});
      destination.blocks.push_back(block.data());
    }
    read_layer(files, source, begin, end, destination);
    std::vector<std::byte> all;
    for (const auto& block : blocks) all.insert(all.end(), block.begin(), block.end());
    for (std::uint64_t i = 0; i < all.size(); ++i)  // bytes outside [begin, end) are unchanged
      if (i + first * block_bytes < begin || i + first * block_bytes >= end)
        CHECK(all[i] == std::byte{0xEE});
    const auto from = all.begin() + static_cast<std::ptrdiff_t>(begin - first * block_bytes);
    return {from, from + static_cast<std::ptrdiff_t>(end - begin)};
  }

  ModelFile file;
  std::vector<File> files;
};

// Returns the layer's bytes, computed segment by segment.
std::vector<std::byte> expected(const std::vector<std::byte>& content, const LayerSource& source,
                                std::uint64_t begin, std::uint64_t end) {
  std::vector<std::byte> layer(end);
  for (const Segment& segment : source.segments)
    for (std::uint64_t i = 0; i < segment.bytes && segment.layer_offset + i < end; ++i)
      layer[segment.layer_offset + i] = content[segment.file_offset + i];
  layer.erase(layer.begin(), layer.begin() + static_cast<std::ptrdiff_t>(begin));
  return layer;
}

}  // namespace

TEST(reads_that_are_short_or_interrupted_are_continued) {
  const Scattered source(100'000);
  const LayerSource whole{{{0, 0, 0, 100'000}}};
  int calls = 0;
  const ReadsGo go([&](int descriptor, const iovec* vectors, int, off_t offset) -> ssize_t {
    if (++calls % 3 == 0) {
      errno = EINTR;
      return -1;
    }
    const iovec some{vectors[0].iov_base, std::min<std::size_t>(vectors[0].iov_len, 777)};
    return real_preadv(descriptor, &some, 1, offset);
  });
  CHECK(source.read(whole, 0, 100'000, 4096) == source.content());
  CHECK(calls > 100);
}

TEST(more_blocks_than_one_call_takes_are_read) {
  const Scattered source(1'000'000);
  const LayerSource whole{{{0, 0, 0, 1'000'000}}};
  CHECK(source.read(whole, 0, 1'000'000, 512) == source.content());
}

TEST(many_small_segments_with_holes_are_read) {
  const Scattered source(300'000);
  LayerSource scattered;
  for (std::uint64_t i = 0, at = 3; i < 2000; ++i) {
    scattered.segments.push_back({0, (i * 7919) % 299'000, at, i % 5 ? i % 129 : 0});
    at += scattered.segments.back().bytes + (i % 3 ? 0 : i % 61);
  }
  const std::uint64_t end = scattered.segments.back().layer_offset + 5000;
  const auto content = source.content();
  using Offsets = std::vector<std::uint64_t>;
  for (const std::uint64_t block : Offsets{61, 4096, 1'000'000})
    for (const std::uint64_t begin : Offsets{0, 2, 3, 50'000, end - 1})
      for (const std::uint64_t stop : Offsets{begin, begin + 1, begin + 20'000, end})
        if (stop <= end)
          CHECK(source.read(scattered, begin, stop, block) ==
                expected(content, scattered, begin, stop));
}

// The file is read in pieces, and converted elements cross the borders of blocks.
TEST(casts_continue_after_short_or_interrupted_reads) {
  const std::uint64_t count = 200'001;
  const Scattered source(4 * count + 6);
  const auto content = source.content();
  int calls = 0;
  const ReadsGo go([&](int descriptor, const iovec* vectors, int, off_t offset) -> ssize_t {
    if (++calls % 3 == 0) {
      errno = EINTR;
      return -1;
    }
    const iovec some{vectors[0].iov_base, std::min<std::size_t>(vectors[0].iov_len, 7777)};
    return real_preadv(descriptor, &some, 1, offset);
  });
  for (const CastKind kind : {CastKind::f32_to_bf16, CastKind::f16_to_f32, CastKind::f16_to_bf16}) {
    const auto [from, to] = widths(kind);
    std::vector<std::byte> wanted(256 + count * to);
    run_on_cpu(CastCall{.kind = kind,
                        .from = reinterpret_cast<Address>(content.data() + 3),
                        .to = reinterpret_cast<Address>(wanted.data() + 256),
                        .count = count});
    const LayerSource cast{{{0, 3, 256, count * to, kind}}};
    for (const std::uint64_t block : {4096, 1 << 20})
      for (const std::uint64_t begin : {0, 256, 4096, 262'144, 300'000}) {
        const auto tail = wanted.begin() + static_cast<std::ptrdiff_t>(begin);
        CHECK(source.read(cast, begin, wanted.size(), block) ==
              std::vector<std::byte>(tail, wanted.end()));
      }
  }
}

TEST(a_cast_of_a_file_that_ends_too_soon_is_refused) {
  const Scattered source(4096);
  const LayerSource whole{{{0, 0, 0, 2048, CastKind::f32_to_bf16}}};
  CHECK(source.read(whole, 0, 2048, 4096).size() == 2048);
  const LayerSource beyond{{{0, 0, 0, 2050, CastKind::f32_to_bf16}}};
  CHECK_THROWS(corrupt_checkpoint, source.read(beyond, 0, 2050, 4096));
}

TEST(casts_that_cut_elements_are_refused) {
  Watched device;
  const auto runtime = Runtime::make(device.driver, options(1));
  const ModelFile file(1, {4096});
  const auto attempt = [&](const Segment& segment) {
    std::vector<File> files;
    files.push_back(file.open());
    runtime->register_model("m", std::move(files), {{1024, {segment}}}, false);
  };
  for (const Segment& segment : {Segment{0, 0, 1, 1022, CastKind::f32_to_bf16},
                                 Segment{0, 0, 0, 1023, CastKind::f32_to_bf16},
                                 Segment{0, 0, 2, 1020, CastKind::bf16_to_f32},
                                 Segment{0, 0, 0, 1022, CastKind::bf16_to_f32},
                                 Segment{0, 0, 0, 1024, static_cast<CastKind>(99)},
                                 Segment{0, 0, 512, 1024, CastKind::f32_to_bf16}})
    CHECK_THROWS(invalid_argument, attempt(segment));
  attempt({0, 3, 2, 1022, CastKind::f32_to_bf16});
}

TEST(a_read_that_fails_says_why) {
  const Scattered source(4096);
  const ReadsGo go([](auto...) {
    errno = EIO;
    return ssize_t{-1};
  });
  CHECK_THROWS(general, source.read({{{0, 0, 0, 4096}}}, 0, 4096, 4096));
}

TEST(a_file_that_ends_too_soon_is_refused) {
  const Scattered source(4096);
  CHECK_THROWS(corrupt_checkpoint, source.read({{{0, 100, 0, 4096}}}, 0, 4096, 4096));
  CHECK_THROWS(corrupt_checkpoint, source.read({{{0, 1 << 30, 0, 9}}}, 0, 9, 4096));
}

// The read returns its full length, with zeros for the part that was cut off.
TEST(a_file_truncated_during_a_read_is_refused) {
  const Scattered source(100'000);
  const ReadsGo go([&](int descriptor, const iovec* vectors, int count, off_t offset) {
    const ssize_t got = real_preadv(descriptor, vectors, count, offset);
    CHECK(::truncate(source.file.path().c_str(), 50'000) == 0);
    return got;
  });
  CHECK_THROWS(corrupt_checkpoint, source.read({{{0, 0, 0, 100'000}}}, 0, 100'000, 100'000));
}

// The file changes between two loads in one of these ways. The whole model fails; other models
// still work.
TEST(a_changed_file_fails_only_its_model) {
  using Change = void (*)(const char* path);
  const Change cut = [](const char* path) { CHECK(::truncate(path, 1000) == 0); };
  const Change touch = [](const char* path) {
    const timespec times[]{{1, 0}, {1, 0}};
    CHECK(::utimensat(AT_FDCWD, path, times, 0) == 0);
  };
  const Change replace = [](const char* path) {
    const ModelFile other(7, {kGranule, 9});
    CHECK(::rename(other.path().c_str(), path) == 0);
  };
  const Change overwrite = [](const char* path) {
    std::FILE* stream = std::fopen(path, "r+");
    CHECK(stream && std::fputc('!', stream) == '!' && std::fclose(stream) == 0);
  };
  for (const bool host_view : {true, false})
    for (const Change change : {cut, touch, replace, overwrite}) {
      Watched device({.host_view = host_view});
      auto runtime = Runtime::make(device.driver, options(4));
      const ModelFile file(1, {kGranule, 9}), other_file(2, {kGranule, 9});
      ModelPtr model = file.register_in(*runtime), other = other_file.register_in(*runtime);
      {
        const Leased leased(*runtime, {model, other});
      }
      runtime->evict(model, in(kLong), nullptr);
      change(file.path().c_str());
      CHECK_THROWS(corrupt_checkpoint, Leased(*runtime, {model}));
      CHECK_THROWS(corrupt_checkpoint,
                   runtime->wait(runtime->prewarm(model, kBackground), in(kLong), nullptr));
      runtime->check_invariants();
      {
        const Leased leased(*runtime, {other});
        CHECK(other_file.is_in(*runtime, other));
      }
      runtime->unregister(model, in(kLong), nullptr);
      const ModelFile good(1, {kGranule, 9});
      model = good.register_in(*runtime);
      {
        const Leased leased(*runtime, {model, other});
        CHECK(good.is_in(*runtime, model) && other_file.is_in(*runtime, other));
      }
      runtime->close(nullptr);
      runtime.reset();
      model.reset();
      other.reset();
      device.expect_returned();
    }
}

// The first chunks have arrived when the file is truncated.
TEST(a_load_fails_if_its_file_is_truncated) {
  for (const bool host_view : {true, false}) {
    const Watched device({.threads = false, .host_view = host_view});
    const auto runtime = Runtime::make(device.driver, options(4, 0));
    const ModelFile file(1, {2 * kGranule});
    const ModelPtr model = file.register_in(*runtime);
    const TicketPtr ticket = runtime->prewarm(model, kBackground);
    for (int i = 0; i < 4; ++i) CHECK(runtime->step());
    CHECK(::truncate(file.path().c_str(), kGranule) == 0);
    CHECK_THROWS(corrupt_checkpoint, runtime->wait(ticket, in(kLong), nullptr));
    while (runtime->step()) {
    }
    CHECK(runtime->state().granules_free == 4);
    runtime->check_invariants();
    device.expect_kept();
  }
}

}  // namespace warmserve
