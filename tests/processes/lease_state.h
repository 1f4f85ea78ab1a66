// The state of the processes that lease a layer, as tests/processes/lease_model.h models them, and
// what the protocol promises about it.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

using std::uint8_t;

constexpr int kClients = 2, kThreads = 2;

// Generations are relative to the generation in the books, so that evictions are unlimited in
// number and states are not.
enum class Generation : uint8_t { none, current, older };

enum class Word : uint8_t { resident, draining, gone, filling };

enum class At : uint8_t {  // where a leasing thread is
  idle,
  look,  // has added its hold; it will read `mapped`
  lease,
  released,    // has taken its hold back; it will wake the link thread if nothing is mapped
  back_out,    // found nothing mapped; it will take its hold back
  backed_out,  // has taken its hold back; it will wake the link thread
  ask,         // will send WANT
  wait,
  // Only with a fault:
  add,         // has read `hold`; it will store one more
  take,        // has read `hold`; it will store one less
  count_late,  // found the layer mapped; it will add its hold
  uncounted,   // has a lease; it will add its hold
};

struct Thread {
  At at : 4;
  uint8_t store : 4;  // 1 + the `hold` that it will store or that is in its store buffer; else 0
};

enum class Link : uint8_t {  // what the link thread does next
  read,
  admit,    // adds the holds of the waiting threads
  publish,  // sets `mapped`
  check,    // looks for holds
  sleep,    // until it is woken
  unmap,
  tell,  // sends UNMAPPED
};

enum class Op : uint8_t { none, map, revoke };

struct Message {
  Op op : 4;
  Generation generation : 4;
};

enum class Process : uint8_t {
  connected,
  greeting,  // its HELLO is on its way to a new broker
  orphaned,  // its broker has crashed
  ending,    // its connection has ended, but its threads still run
  ended,     // the broker does not know it yet
  absent,
};

struct Client {
  uint8_t hold : 4;
  Generation mapped : 2;
  Generation backed : 2;  // of the granule that its page tables map
  Process process : 3;
  Link link : 3;
  bool woken : 1;  // the link thread
  bool asked : 1;  // WANT has been sent, and no MAP has been read since
  // On their way to the broker, and in the broker.
  Generation hello : 2;  // as HELLO says
  bool unmapped : 1;     // UNMAPPED, behind HELLO
  bool may_map : 1;      // in the books
  bool revoked : 1;      // REVOKE has been sent
  bool unnoted : 1;      // only with a fault: MAP has been sent, and `may_map` will be set
  uint8_t unused : 2;
  std::array<Message, 2> inbox;
  std::array<Thread, kThreads> threads;

  bool runs() const { return process <= Process::ending; }
  bool has_link() const { return process <= Process::orphaned; }
  bool drains() const { return link == Link::check || link == Link::sleep; }
};

struct State {
  std::array<Client, kClients> clients;
  Word word : 2;
  bool torn : 1;  // the granule has other bytes than those of the generation in the books
  bool down : 1;  // the broker has crashed
  uint8_t unused : 4;
  uint8_t padding;
};

static_assert(std::has_unique_object_representations_v<State>);

// Clients are alike, and so are the threads of one: only one order of them is searched.
inline State canonical(State state, int clients, int threads) {
  const auto sort = [](auto& pair, int count) {
    using Bytes = std::array<unsigned char, sizeof pair[0]>;
    if (count == 2 && std::bit_cast<Bytes>(pair[1]) < std::bit_cast<Bytes>(pair[0]))
      std::swap(pair[0], pair[1]);
  };
  for (Client& client : state.clients) sort(client.threads, threads);
  sort(state.clients, clients);
  return state;
}

enum class Verdict { holds, bad_lease, bad_mapping, torn, stuck };

inline const char* meaning(Verdict verdict) {
  switch (verdict) {
    case Verdict::holds: return "holds";
    case Verdict::bad_lease:
      return "a lease uses an unmapped address or bytes of another generation";
    case Verdict::bad_mapping:
      return "a client maps a granule that has bytes of another generation";
    case Verdict::torn: return "the broker takes torn bytes for resident";
    case Verdict::stuck: return "an eviction or a waiting thread never ends, though leases end";
  }
  return "";
}

// Returns whether a state has this verdict, by itself.
inline bool has(const State& state, Verdict verdict) {
  const auto any = [](const auto& things, const auto& is) {
    return std::ranges::any_of(things, is);
  };
  const auto wrong_bytes = [&](const Client& client) {
    return client.backed == Generation::older ||
           (client.backed == Generation::current && state.torn);
  };
  const auto leases = [](Thread thread) {
    return thread.at == At::lease || thread.at == At::uncounted;
  };
  switch (verdict) {
    case Verdict::bad_lease:
      return any(state.clients, [&](const Client& client) {
        return any(client.threads, leases) &&
               (client.backed == Generation::none || wrong_bytes(client));
      });
    case Verdict::bad_mapping: return any(state.clients, wrong_bytes);
    case Verdict::torn: return !state.down && state.word == Word::resident && state.torn;
    default: return false;
  }
}

// Returns whether all may stop in a state: no eviction is under way, and no thread waits.
inline bool at_rest(const State& state) {
  const auto rests = [](const Client& client) {
    return std::ranges::all_of(client.threads, [](Thread t) { return t.at == At::idle; });
  };
  return !state.down && state.word == Word::resident && std::ranges::all_of(state.clients, rests);
}
