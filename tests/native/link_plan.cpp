// Each piece takes the link that would finish it first. Therefore a load ends as early as all links
// together allow, except for the last pieces, for any speeds and changes of speed.
#include <deque>
#include <memory>
#include <random>
#include <utility>

#include "check.h"
#include "load/link_traffic.h"

namespace warmserve {
namespace {

constexpr std::uint64_t kPiece = 8 * kMiB;

std::chrono::nanoseconds takes(std::uint64_t bytes, double rate) {
  return std::chrono::nanoseconds(
      static_cast<std::int64_t>(static_cast<double>(bytes) / rate * 1e9));
}

// A link with its own speed, in bytes per second, on a clock that the test advances.
struct Link {
  double rate;
  LinkTraffic traffic{};
  std::deque<std::pair<std::uint64_t, Deadline>> under_way{};  // (bytes, time of completion)
  std::uint64_t carried = 0;
  bool open = true;

  bool takes() const { return open; }
  void send(std::uint64_t bytes, Deadline now) {
    const Deadline begin = under_way.empty() ? now : under_way.back().second;
    under_way.push_back({bytes, begin + warmserve::takes(bytes, rate)});
    traffic.sent(bytes, now);
  }
  void complete() {
    const auto [bytes, when] = under_way.front();
    under_way.pop_front();
    traffic.completed(bytes, when);
    carried += bytes;
  }
};
using Links = std::vector<std::unique_ptr<Link>>;

Links make(const std::vector<double>& rates) {
  Links links;
  for (const double rate : rates) links.push_back(std::make_unique<Link>(Link{rate}));
  return links;
}

double total(const Links& links) {
  double sum = 0;
  for (const auto& link : links) sum += link->rate;
  return sum;
}

// Completes the next piece and returns the time.
Deadline complete_next(Links& links) {
  Link* next = nullptr;
  for (const auto& link : links)
    if (!link->under_way.empty() &&
        (!next || link->under_way.front().second < next->under_way.front().second))
      next = link.get();
  const Deadline when = next->under_way.front().second;
  next->complete();
  return when;
}

bool under_way(const Links& links) {
  return std::any_of(links.begin(), links.end(),
                     [](const auto& link) { return !link->under_way.empty(); });
}

// Loads `bytes` through `chunks` staging chunks. Returns the seconds until the last piece is
// complete.
double load(Links& links, std::uint64_t bytes, std::size_t chunks, Deadline now = Deadline{},
            const std::function<void(std::uint64_t sent, Deadline now)>& meanwhile = nullptr) {
  const Deadline begin = now;
  std::size_t free = chunks;
  for (std::uint64_t sent = 0; sent < bytes || under_way(links);) {
    const std::uint64_t piece = std::min(kPiece, bytes - sent);
    Link* link = piece && free ? earliest_finish(links, piece, now) : nullptr;
    if (link) {
      if (meanwhile) meanwhile(sent, now);
      link->send(piece, now);
      sent += piece;
      --free;
    } else {
      now = complete_next(links);
      ++free;
    }
  }
  return std::chrono::duration<double>(now - begin).count();
}

// Sends one piece over each link, so that its speed is known. Returns the time after that.
Deadline measure(Links& links) {
  const Deadline end = Deadline{} + std::chrono::seconds(100);
  for (const auto& link : links) {
    link->send(kPiece, end - takes(kPiece, link->rate));
    link->complete();
    link->carried = 0;
  }
  return end;
}

}  // namespace

TEST(a_load_ends_as_soon_as_all_links_together_allow) {
  std::mt19937 random(1);
  for (int round = 0; round < 3000; ++round) {
    std::vector<double> rates;
    for (std::size_t i = 0, count = 1 + random() % 4; i < count; ++i)
      rates.push_back(1e9 * static_cast<double>(1 + random() % 64));
    Links links = make(rates);
    const Deadline now = measure(links);
    const std::uint64_t bytes = 1 + random() % (200 * kPiece);
    const double bound = static_cast<double>(bytes + (links.size() - 1) * kPiece) / total(links);
    const double took = load(links, bytes, ~0ull, now);
    CHECK(took <= bound * (1 + 1e-6) + 1e-6);
    std::uint64_t carried = 0;
    for (const auto& link : links) carried += link->carried;
    CHECK(carried == bytes);
  }
}

// As in real loads: few chunks, and speeds that must be measured first.
TEST(a_load_of_few_chunks_over_unmeasured_links_ends_nearly_as_soon) {
  std::mt19937 random(2);
  for (int round = 0; round < 3000; ++round) {
    std::vector<double> rates;
    for (std::size_t i = 0, count = 2 + random() % 3; i < count; ++i)
      rates.push_back(1e9 * static_cast<double>(8 + random() % 25));
    Links links = make(rates);
    const std::uint64_t bytes = 64 * kPiece + random() % (200 * kPiece);
    const double slowest = *std::min_element(rates.begin(), rates.end());
    const double bound = static_cast<double>(bytes + links.size() * kPiece) / total(links) +
                         static_cast<double>(kPiece) / slowest;
    CHECK(load(links, bytes, 16) <= bound);
  }
}

TEST(a_slow_link_gets_few_pieces_and_a_recovered_link_its_share) {
  Links links = make({20e9, 20e9});
  const std::uint64_t part = 1000 * kPiece;
  std::vector<std::uint64_t> carried;  // by the second link, in each part
  load(links, 4 * part, 16, Deadline{}, [&](std::uint64_t sent, Deadline) {
    if (sent % part) return;
    if (sent) carried.push_back(std::exchange(links[1]->carried, 0) / kPiece);
    links[1]->rate = sent == part ? 0.5e9 : 20e9;
  });
  CHECK(carried[0] >= 480 && carried[0] <= 520);
  CHECK(carried[1] <= 40);  // 8 pieces were in flight; its share at the new speed would be 24
  CHECK(links[1]->carried / kPiece >= 480);
}

TEST(no_new_piece_waits_for_a_stalled_link) {
  Links links = make({10e9, 40e9});
  Deadline now = measure(links);
  links[1]->rate = 1;
  for (int i = 0; i < 4; ++i) links[1]->send(kPiece, now);
  // By its measured speed alone the link would still be chosen a second later.
  now += std::chrono::seconds(1);
  CHECK(earliest_finish(links, kPiece, now) == links[0].get());
}

TEST(a_closed_link_gets_no_pieces) {
  Links links = make({1e9, 50e9, 50e9});
  measure(links);
  links[1]->open = links[2]->open = false;
  load(links, 20 * kPiece, 8);
  CHECK(links[0]->carried == 20 * kPiece);
}

TEST(an_unmeasured_link_gets_one_piece) {
  Links links = make({10e9, 10e9});
  const Deadline now{};
  for (const auto& link : links) {
    CHECK(earliest_finish(links, kPiece, now) == link.get());
    link->send(kPiece, now);
  }
  CHECK(earliest_finish(links, kPiece, now) == nullptr);
  complete_next(links);
  CHECK(earliest_finish(links, kPiece, now + takes(kPiece, 10e9)) == links[0].get());
}

TEST(the_speed_counts_only_time_with_work) {
  LinkTraffic traffic;
  CHECK(traffic.bandwidth() == 0);
  Deadline now{};
  for (int i = 0; i < 20; ++i) {
    traffic.sent(kPiece, now);
    traffic.sent(kPiece, now);
    now += takes(kPiece, 5e9);
    traffic.completed(kPiece, now);
    now += takes(kPiece, 5e9);
    traffic.completed(kPiece, now);
    now += std::chrono::seconds(1);  // idle
  }
  CHECK(traffic.bandwidth() > 4.99e9 && traffic.bandwidth() < 5.01e9);
  traffic.sent(kPiece, now);
  traffic.lost(kPiece);
  CHECK(traffic.idle() && traffic.bandwidth() > 4.99e9);
}

}  // namespace warmserve
