// A model of the protocol by which processes (clients) lease a layer from an arena that another
// process (the broker) owns: the steps that are possible in each state.
//
// The model has one layer on one granule. Each client has leasing threads and one link thread,
// which reads the broker's messages. The books are `word` and `may_map`; they survive a crash of
// the broker. WANT is `asked`: the broker sees it at any later time, and a client repeats it after
// HELLO. HELD is left out, because no step depends on it.
//
// The client's lock protects its waiting threads. The link thread holds this lock from adding their
// holds until `mapped` is published. Releasing a lock drains the store buffer, as does each locked
// instruction, so only the plain stores of broken variants stay in a store buffer. A new broker
// sees the stores of the crashed one in their order, as x86 ensures.
#pragma once

#include <algorithm>
#include <vector>

#include "lease_setup.h"
#include "lease_state.h"

enum class Actor { thread, link, process, broker };

struct Step {
  State to;
  const char* what;
  Actor actor;
  int client, thread;  // that the step concerns, or -1
  bool owed;           // it is taken sooner or later; other steps may never be taken
};

class Model {
 public:
  explicit Model(const Setup& setup) : setup_(setup) {}

  State start() const {
    State state{};
    for (int c = setup_.clients; c < kClients; ++c) state.clients[c].process = Process::absent;
    return state;
  }

  // Returns the steps that are possible in a state. They are valid until the next call.
  const std::vector<Step>& steps(const State& state) {
    now_ = &state;
    steps_.clear();
    for (client_ = 0; client_ < setup_.clients; ++client_) {
      actor_ = Actor::thread;
      for (thread_ = 0; thread_ < setup_.threads; ++thread_)
        if (here().runs()) move_thread();
      thread_ = -1;
      actor_ = Actor::link;
      if (here().has_link()) move_link();
      actor_ = Actor::process;
      if (setup_.client_crashes && here().has_link()) hang_up();
      if (here().process >= Process::ending) move_process();
      actor_ = Actor::broker;
      if (!state.down) serve();
    }
    client_ = -1;
    state.down ? restart() : evict_and_fill();
    if (setup_.broker_crashes && !state.down) crash();
    return steps_;
  }

 private:
  bool faulty(Fault fault) const { return setup_.fault == fault; }
  const Client& here() const { return now_->clients[client_]; }

  // Each of these adds a step, and returns the part of its result that the caller still changes.
  State& step(const char* what, bool owed = true) {
    steps_.push_back({*now_, what, actor_, client_, thread_, owed});
    return steps_.back().to;
  }
  Client& act(const char* what, bool owed = true) { return step(what, owed).clients[client_]; }
  Client& go(At at, const char* what, bool owed = true) {
    Client& client = act(what, owed);
    client.threads[thread_].at = at;
    return client;
  }
  Client& then(Link link, const char* what) {
    Client& client = act(what);
    client.link = link;
    return client;
  }

  // ---- A leasing thread ----

  void drain_store_buffer(Client& client) const {
    Thread& thread = client.threads[thread_];
    if (thread.store) client.hold = thread.store - 1;
    thread.store = 0;
  }
  void locked_add(Client& client, int count) const {
    drain_store_buffer(client);
    client.hold += count;
  }
  // The load of an addition without a lock. The store is the next step.
  void load_to_add(Client& client, int count) const {
    drain_store_buffer(client);
    client.threads[thread_].store = 1 + client.hold + count;
  }

  void move_thread() {
    const Thread& thread = here().threads[thread_];
    const bool mapped = here().mapped != Generation::none;
    if (thread.store && thread.at != At::add && thread.at != At::take)
      drain_store_buffer(act("its store reaches the memory"));
    switch (thread.at) {
      case At::idle: return begin(mapped);
      case At::look:
        go(mapped ? At::lease : At::back_out,
           mapped ? "finds the layer mapped, has a lease" : "finds nothing mapped");
        return;
      case At::lease:
        if (faulty(Fault::plain_release))
          load_to_add(go(At::take, "ends its lease: reads `hold`"), -1);
        else
          locked_add(go(At::released, "ends its lease: takes its hold back"), -1);
        return;
      case At::released: return wake_link(At::idle, !mapped && !faulty(Fault::silent_release));
      case At::back_out: return locked_add(go(At::backed_out, "takes its hold back"), -1);
      case At::backed_out: return wake_link(At::ask, !faulty(Fault::silent_back_out));
      case At::ask:
        if (here().link == Link::publish) return;  // which holds the client's lock
        if (mapped && !faulty(Fault::no_second_look))
          go(At::idle, "finds the layer mapped by now");
        else
          go(At::wait, "sends WANT and waits").asked = true;
        return;
      case At::wait: go(At::idle, "gives up", false); return;
      case At::add: {
        Client& next = go(At::look, "stores one hold more");
        if (faulty(Fault::fenced_add)) drain_store_buffer(next);
        return;
      }
      case At::take: go(At::released, "stores one hold less"); return;
      case At::count_late: return locked_add(go(At::lease, "adds its hold, has a lease"), 1);
      case At::uncounted: return locked_add(go(At::lease, "wakes and adds its hold"), 1);
    }
  }

  void begin(bool mapped) {
    if (faulty(Fault::looks_first))
      go(mapped ? At::count_late : At::ask,
         mapped ? "finds the layer mapped" : "finds nothing mapped", false);
    else if (faulty(Fault::plain_add) || faulty(Fault::fenced_add))
      load_to_add(go(At::add, "reads `hold` to add one", false), 1);
    else
      locked_add(go(At::look, "adds its hold", false), 1);
  }

  void wake_link(At at, bool wakes) {
    Client& next = go(at, wakes ? "wakes the link thread" : "does not wake the link thread");
    if (wakes && next.drains()) next.woken = true;
  }

  // ---- The link thread ----

  static void take_message(Client& client) { client.inbox = {client.inbox[1], Message{}}; }
  // A message to a broker that has crashed is lost.
  static void send_unmapped(Client& client) {
    client.unmapped = client.process != Process::orphaned;
  }

  void move_link() {
    const Message& message = here().inbox[0];
    const bool tells_first = faulty(Fault::tells_first);
    if (here().process == Process::orphaned) reconnect();
    if (here().drains() && message.op == Op::revoke) take_message(act("reads REVOKE once more"));
    switch (here().link) {
      case Link::read:
        if (message.op == Op::map) read_map();
        if (message.op == Op::revoke) read_revoke();
        return;
      case Link::admit:
        return admit(then(Link::publish, "adds the holds of the waiting threads"), At::lease);
      case Link::publish: then(Link::read, "publishes `mapped`").mapped = here().backed; return;
      case Link::check:
        if (here().hold)
          then(Link::sleep, "finds holds and sleeps");
        else
          then(tells_first ? Link::tell : Link::unmap, "finds no holds").woken = false;
        return;
      case Link::sleep:
        if (here().woken) then(Link::check, "wakes").woken = false;
        return;
      case Link::unmap:
        then(tells_first ? Link::read : Link::tell, "unmaps").backed = Generation::none;
        return;
      case Link::tell:
        return send_unmapped(then(tells_first ? Link::unmap : Link::read, "sends UNMAPPED"));
    }
  }

  // Begins the leases of the waiting threads.
  static void admit(Client& client, At at) {
    for (Thread& thread : client.threads) {
      if (thread.at != At::wait) continue;
      thread.at = at;
      if (at == At::lease) ++client.hold;
    }
    client.asked = false;
  }

  void read_map() {
    const auto waits = [](Thread thread) { return thread.at == At::wait; };
    if (std::ranges::none_of(here().threads, waits)) {  // both answers are allowed
      Client& next = act("reads a MAP that no thread waits for, sends UNMAPPED");
      take_message(next);
      next.asked = false;
      send_unmapped(next);
    }
    Client& next = then(Link::admit, "reads MAP and maps");
    take_message(next);
    next.backed = here().inbox[0].generation;
    if (faulty(Fault::counts_waiters_late)) {
      next.mapped = next.backed;
      admit(next, At::uncounted);
      next.link = Link::read;
    }
  }

  void read_revoke() {
    if (here().inbox[0].generation != here().backed) {
      Client& next = act("drops a REVOKE of a generation that it does not map");
      take_message(next);
      if (faulty(Fault::answers_twice)) send_unmapped(next);
      return;
    }
    Client& next = then(faulty(Fault::no_wait) ? Link::unmap : Link::check,
                        "reads REVOKE, sets `mapped` to 0");
    take_message(next);
    next.mapped = Generation::none;
  }

  // A REVOKE of the old connection is dropped, or the client goes on with it: both are safe.
  void reconnect() {
    if (here().drains()) then(Link::admit, "drops the REVOKE of the old connection").woken = false;
    if (now_->down || !(here().link == Link::read || here().drains())) return;
    Client& next = act("says HELLO, with the generation that it maps");
    next.process = Process::greeting;
    next.hello = next.backed;
  }

  // ---- A client's process ----

  static void lose_connection(Client& client, Process process) {
    client.process = process;
    client.hello = Generation::none;
    client.unmapped = client.revoked = client.unnoted = false;
  }

  void hang_up() {
    Client& next = act("its connection ends before its process", false);
    lose_connection(next, Process::ending);
    next.link = Link::read;
    next.woken = false;
    next.inbox = {};
    if (faulty(Fault::reuses_at_hangup)) next.may_map = false;
  }

  void move_process() {
    if (here().process == Process::ending) {
      Client& next = act("its process ends");
      next = {};
      next.process = Process::ended;
      next.may_map = here().may_map;
    } else if (here().process == Process::ended && !now_->down) {
      Client& next = act("the broker sees that the process has ended");
      next.process = Process::absent;
      next.may_map = false;
    } else if (here().process == Process::absent && !now_->down) {
      act("a new process connects", false).process = Process::connected;
    }
  }

  // ---- The broker ----

  // The broker's steps that concern one client.
  void serve() {
    if (here().process == Process::greeting) {
      Client& next = act("reads HELLO of");
      next.process = Process::connected;
      next.may_map = here().hello != Generation::none;
      next.hello = Generation::none;
      return;
    }
    if (here().unmapped) {
      Client& next = act("reads UNMAPPED of");
      next.unmapped = next.may_map = next.revoked = false;
    }
    if (here().unnoted) {
      Client& next = act("notes the mapping of");
      next.unnoted = false;
      next.may_map = true;
    }
    if (here().process == Process::connected && here().inbox[1].op == Op::none) send();
  }

  static void put(Client& client, Op op) {
    Message& message = client.inbox[client.inbox[0].op == Op::none ? 0 : 1];
    message.op = op;
    message.generation = Generation::current;
  }

  void send() {
    if (now_->word == Word::draining && here().may_map && !here().revoked) {
      Client& next = act("sends REVOKE to");
      put(next, Op::revoke);
      next.revoked = true;
    }
    const bool again = faulty(Fault::maps_twice) && here().inbox[0].op == Op::none;
    const bool has_it = here().may_map || here().unnoted;
    if (now_->word == Word::resident && here().asked && (!has_it || again)) {
      Client& next = act("sends MAP to");
      put(next, Op::map);
      next.unnoted = faulty(Fault::notes_map_late);
      next.may_map = !next.unnoted;
    }
  }

  void evict_and_fill() {
    const auto may_map = [](const Client& client) { return client.may_map; };
    switch (now_->word) {
      case Word::resident:
        step("begins an eviction: writes `draining`", false).word = Word::draining;
        return;
      case Word::draining:
        if (std::ranges::any_of(now_->clients, may_map)) return;
        if (faulty(Fault::gone_late) && !now_->torn)
          step("begins to overwrite the granule").torn = true;
        else
          step("writes `gone`, since no client may map the layer").word = Word::gone;
        return;
      case Word::gone:
        if (now_->torn)
          begin_generation(step("writes `filling`"));
        else
          step("begins to overwrite the granule").torn = true;
        return;
      case Word::filling:
        if (now_->torn)
          step("writes the bytes").torn = false;
        else
          step("writes `resident`").word = Word::resident;
        return;
    }
  }

  static void begin_generation(State& state) {
    state.word = Word::filling;
    const auto age = [](Generation g) { return g == Generation::none ? g : Generation::older; };
    for (Client& client : state.clients) {
      client.mapped = age(client.mapped);
      client.backed = age(client.backed);
      client.hello = age(client.hello);
      for (Message& message : client.inbox) message.generation = age(message.generation);
    }
  }

  void crash() {
    State& next = step("crashes", false);
    next.down = true;
    for (Client& client : next.clients) {
      if (client.has_link()) lose_connection(client, Process::orphaned);
      if (faulty(Fault::forgets_want)) client.asked = false;
      if (!faulty(Fault::old_messages)) client.inbox = {};
    }
  }

  void restart() {
    const bool trusts = faulty(Fault::trusts_books);
    switch (now_->word) {
      case Word::resident: return start_with(Word::resident, "restarts and finds `resident`");
      case Word::draining:  // the bytes are still whole, so both are allowed
        if (!trusts) start_with(Word::draining, "restarts and finds `draining`");
        return start_with(Word::resident, "restarts, finds `draining`, writes `resident`");
      case Word::gone: return start_with(Word::gone, "restarts and finds `gone`");
      case Word::filling:
        return trusts ? start_with(Word::resident, "restarts, takes `filling` for `resident`")
                      : start_with(Word::gone, "restarts, finds `filling`, writes `gone`");
    }
  }

  void start_with(Word word, const char* what) {
    State& next = step(what);
    next.down = false;
    next.word = word;
    if (!faulty(Fault::no_hello)) return;
    for (Client& client : next.clients)
      if (client.process == Process::orphaned) client.may_map = false;
  }

  const Setup setup_;
  const State* now_ = nullptr;
  Actor actor_ = Actor::broker;
  int client_ = -1, thread_ = -1;
  std::vector<Step> steps_;
};
