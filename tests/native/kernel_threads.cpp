// The kernels' code for many GPU threads, run on one CPU thread. It consists of the bodies that
// nvcc compiles, with the vector accesses and the division of labour of a grid; the simulated
// threads run one after the other. Each result must be equal, to the bit, to that of the
// single-threaded CPU code.
#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/weight_kernels.inl"

namespace {

using namespace warmserve;

struct SimulatedThread {
  static constexpr std::uint64_t kRun = 8;  // as in weight_kernels.cu
  std::uint64_t thread, threads, block, blocks;
  std::uint32_t in_block, block_size;
  std::vector<std::uint64_t>* sums;  // of the block: one per call of sum()
  std::size_t summed = 0;

  // The last thread of the block gets the complete sum, because all threads have added to it then.
  bool sum(std::uint64_t* value) {
    if (summed == sums->size()) sums->push_back(0);
    *value = (*sums)[summed++] += *value;
    return in_block == block_size - 1;
  }
  static std::uint64_t piece(std::uint64_t, std::uint64_t alignment) {
    return bodies::widest_piece(alignment);
  }
  static void copy(std::byte* to, const std::byte* from, std::uint64_t piece, std::uint64_t) {
    CHECK(piece <= 16);
    CHECK((reinterpret_cast<Address>(to) | reinterpret_cast<Address>(from)) % piece == 0);
    std::memcpy(to, from, piece);
  }
};

template <class Call>
void run_on_grid(const Call& call, LaunchShape shape) {
  for (std::uint64_t block = 0; block < shape.blocks; ++block) {
    std::vector<std::uint64_t> sums;
    for (std::uint32_t in_block = 0; in_block < shape.threads; ++in_block) {
      SimulatedThread thread{.thread = block * shape.threads + in_block,
                             .threads = std::uint64_t{shape.blocks} * shape.threads,
                             .block = block,
                             .blocks = shape.blocks,
                             .in_block = in_block,
                             .block_size = shape.threads,
                             .sums = &sums};
      bodies::run(thread, call);
    }
  }
}

Address address(const void* at) { return reinterpret_cast<Address>(at); }

// Bytes that begin `skew` after a multiple of 64, with guard bytes around them that must not
// change.
class Buffer {
 public:
  Buffer(std::uint64_t bytes, std::uint64_t skew) : all_(bytes + skew + 192, 0xA5), bytes_(bytes) {
    begin_ = 64 + (64 - address(all_.data()) % 64) + skew;
    if (begin_ + bytes > all_.size()) all_.resize(begin_ + bytes + 64, 0xA5);
    begin_ = 64 + (64 - address(all_.data()) % 64) + skew;
    all_.resize(begin_ + bytes + 1, 0xA5);
  }
  Buffer(const Buffer&) = delete;
  std::uint8_t* data() { return all_.data() + begin_; }
  Address at() { return address(data()); }
  void randomise(unsigned seed) {
    std::mt19937 random(seed);
    for (std::uint64_t i = 0; i < bytes_; ++i) data()[i] = static_cast<std::uint8_t>(random());
  }
  bool operator==(Buffer& other) {
    return bytes_ == other.bytes_ && std::equal(data(), data() + bytes_, other.data());
  }
  bool untouched_outside() {
    for (std::uint64_t i = 0; i < all_.size(); ++i)
      if ((i < begin_ || i >= begin_ + bytes_) && all_[i] != 0xA5) return false;
    return true;
  }

 private:
  std::vector<std::uint8_t> all_;
  std::uint64_t bytes_, begin_;
};

const LaunchShape kShapes[] = {{1, 1}, {1, 32}, {3, 64}, {2, 1024}};

// Checks that both implementations, and all grids, write the same bytes to the call's second
// address.
template <class Call>
void check_all(const Call& call, std::uint64_t skew) {
  CHECK(misuse(call) == Misuse::none);
  std::vector<Address> addresses;
  for (const Touched& one : touched(call)) addresses.push_back(one.address);
  const std::uint64_t bytes = touched(call)[1].bytes;
  const auto into = [&](Buffer& out) {
    addresses[1] = out.at();
    return std::get<Call>(rebased(call, addresses));
  };
  Buffer wanted(bytes, skew);
  run_on_cpu(into(wanted));
  CHECK(wanted.untouched_outside());
  std::vector<LaunchShape> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.push_back(launch_shape(call));
  for (const LaunchShape& shape : shapes) {
    Buffer out(bytes, skew);
    run_on_grid(into(out), shape);
    CHECK(out == wanted);
    CHECK(out.untouched_outside());
  }
}

}  // namespace

TEST(digests_of_blocks_are_those_of_one_thread) {
  for (const std::uint64_t bytes : {0, 1, 3, 4, 31, 32, 33, 4096, 32771}) {
    for (const std::uint64_t skew : {0, 1, 4, 16}) {
      Buffer from(bytes, skew);
      from.randomise(static_cast<unsigned>(bytes));
      for (const std::uint64_t granule : {1, 5, 64, 4096, 32768})
        if (bytes / granule < 1000) check_all(DigestCall{from.at(), bytes, granule, 0}, 0);
    }
  }
}

TEST(casts_of_grids_are_those_of_one_thread) {
  for (int kind = 0; kind <= static_cast<int>(CastKind::f8_e5m2_to_bf16); ++kind) {
    for (const std::uint64_t count : {0, 1, 7, 8, 9, 64, 1000, 20003}) {
      for (const std::uint64_t skew : {0, 1, 8}) {
        CastCall call{.kind = static_cast<CastKind>(kind), .to = 1 << 30, .count = count};
        Buffer from(touched(call)[0].bytes, skew);
        from.randomise(static_cast<unsigned>(kind));
        call.from = from.at();
        check_all(call, skew);
        check_all(call, 0);
      }
    }
  }
}

TEST(scaled_casts_of_grids_are_those_of_one_thread) {
  struct Shape {
    std::uint64_t rows, columns, block_rows, block_columns;
  };
  for (const auto& [rows, columns, block_rows, block_columns] :
       std::initializer_list<Shape>{{1, 1, 1, 1},
                                    {5, 16, 5, 16},
                                    {5, 16, 1000, 1000},
                                    {40, 24, 1, 24},
                                    {40, 24, 40, 1},
                                    {130, 300, 128, 128},
                                    {33, 70, 7, 3},
                                    {9, 64, 1, 32},
                                    {64, 1, 1, 1},
                                    {3, 13, 2, 1}}) {
    for (const CastKind kind : {CastKind::f8_e4m3_to_bf16, CastKind::f8_e5m2_to_bf16}) {
      for (const std::uint64_t skew : {0, 3}) {
        Buffer from(rows * columns, skew);
        from.randomise(7);
        std::vector<float> scales(ceil_div(rows, block_rows) * ceil_div(columns, block_columns));
        for (std::size_t i = 0; i < scales.size(); ++i)
          scales[i] = 0.37f * static_cast<float>(i + 1);
        check_all(CastCall{.kind = kind,
                           .from = from.at(),
                           .to = 1 << 30,
                           .count = rows * columns,
                           .scales = address(scales.data()),
                           .columns = columns,
                           .block_rows = block_rows,
                           .block_columns = block_columns},
                  skew);
      }
    }
  }
}

TEST(gathers_of_grids_are_those_of_one_thread) {
  for (const std::uint64_t rows : {0, 1, 37}) {
    for (const std::uint64_t row_bytes : {0, 1, 3, 8, 16, 100, 528, 4097}) {
      for (const std::uint64_t extra : {0, 1, 112}) {
        const std::uint64_t pitch = row_bytes + extra;
        Buffer from(rows * pitch, extra % 3);
        from.randomise(static_cast<unsigned>(row_bytes));
        for (const std::uint64_t skew : {0, 1, 8})
          check_all(GatherCall{from.at(), 1 << 30, rows, row_bytes, pitch}, skew);
      }
    }
  }
}

// Large enough that the CPU writes around the cache, as it does for rows of whole cache lines.
TEST(many_short_rows_are_gathered_whole) {
  const std::uint64_t rows = 9001, row_bytes = 512, pitch = 1088;
  Buffer from(rows * pitch, 1), to(rows * row_bytes, 16);
  from.randomise(3);
  run_on_cpu(GatherCall{from.at(), to.at(), rows, row_bytes, pitch});
  for (std::uint64_t row = 0; row < rows; ++row)
    CHECK(std::memcmp(to.data() + row * row_bytes, from.data() + row * pitch, row_bytes) == 0);
  CHECK(to.untouched_outside());
}

TEST(a_launch_is_parsed_into_its_call) {
  const KernelCall calls[] = {DigestCall{1, 2, 3, 8}, CastCall{.count = 9},
                              GatherCall{1, 2, 3, 4, 5}};
  for (const KernelCall& call : calls) {
    KernelCall parsed;
    const void* parameter = std::visit([](const auto& one) -> const void* { return &one; }, call);
    CHECK(parse_kernel(kernel_symbol(call), parameter, &parsed));
    CHECK(parsed.index() == call.index());
    CHECK(touched(parsed).size() == touched(call).size());
    CHECK(touched(parsed)[1].bytes == touched(call)[1].bytes);
  }
  KernelCall parsed;
  CHECK(!parse_kernel("ws_nothing", &parsed, &parsed));
}

TEST(misuse_is_named) {
  CHECK(misuse(DigestCall{64, 64, 0, 8}) == Misuse::empty_granules);
  CHECK(misuse(DigestCall{64, 64, 16, 12}) == Misuse::misaligned_digests);  // the output address
  CHECK(misuse(DigestCall{64, 64, 16, 120}) == Misuse::overlap);
  CHECK(misuse(DigestCall{64, 20ull << 30, 20ull << 30, 8}) == Misuse::digest_too_long);
  CHECK(misuse(DigestCall{~0ull - 8, 64, 64, 8}) == Misuse::past_the_end);
  CHECK(misuse(CastCall{.kind = static_cast<CastKind>(99)}) == Misuse::no_such_cast);
  CHECK(misuse(CastCall{.from = 64, .to = 66, .count = 4}) == Misuse::overlap);
  CHECK(misuse(CastCall{.count = ~0ull}) == Misuse::too_many_elements);
  CHECK(misuse(CastCall{.from = 64, .to = 4096, .count = 4, .columns = 2}) ==
        Misuse::missing_scales);
  CHECK(misuse(GatherCall{64, 4096, 2, 8, 7}) == Misuse::short_pitch);
  CHECK(misuse(GatherCall{64, 4096, ~0ull, 8, 1ull << 32}) == Misuse::too_many_bytes);
  CHECK(misuse(GatherCall{64, 4096, 2, 8, 16}) == Misuse::none);
}
