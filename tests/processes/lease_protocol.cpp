// Judges the protocol by which processes lease from an arena that another process owns, and
// variants of it with one fault. The protocol must hold in every order of steps; each fault must be
// found, with a trace.
//
//   lease_protocol              judges all variants but the slowest; exits with 1 if a verdict is
//                               not as expected
//   lease_protocol --thorough   judges all variants
//   lease_protocol NAME ...     judges these variants
#include <algorithm>
#include <cstdio>
#include <string>
#include <string_view>

#include "lease_model.h"
#include "lease_setup.h"
#include "lease_state.h"
#include "search.h"

namespace {

struct Variant {
  const char* name;
  const char* sentence;
  Verdict expected;
  Setup setup;
  bool slow = false;
};

const Variant kVariants[] = {
    {"two-clients",
     "two clients with two threads each may crash",
     Verdict::holds,
     {.clients = 2, .threads = 2, .client_crashes = true}},
    {"two-threads",
     "one client with two threads may crash, and so may the broker, again and again",
     Verdict::holds,
     {.threads = 2, .client_crashes = true, .broker_crashes = true}},
    {"restarts",
     "two clients may crash, and so may the broker, again and again",
     Verdict::holds,
     {.clients = 2, .client_crashes = true, .broker_crashes = true}},
    {"everything",
     "two clients with two threads each may crash, and so may the broker, again and again",
     Verdict::holds,
     {.clients = 2, .threads = 2, .client_crashes = true, .broker_crashes = true},
     true},

    // Faults of a leasing thread.
    {"plain-add",
     "`hold++` is a load and a store, which may stay in the store buffer",
     Verdict::bad_lease,
     {.fault = Fault::plain_add}},
    {"fenced-add",
     "`hold++` is a load, a store and a fence, so that two threads may count as one",
     Verdict::bad_lease,
     {.threads = 2, .fault = Fault::fenced_add}},
    {"plain-release",
     "`hold--` of a release is a load and a store, which may stay in the store buffer",
     Verdict::stuck,
     {.fault = Fault::plain_release}},
    {"looks-first",
     "a thread reads `mapped` before `hold++` and not after it",
     Verdict::bad_lease,
     {.fault = Fault::looks_first}},
    {"silent-release",
     "a release does not look for a waiting link thread",
     Verdict::stuck,
     {.fault = Fault::silent_release}},
    {"silent-back-out",
     "an attempt that backs out does not look for a waiting link thread",
     Verdict::stuck,
     {.fault = Fault::silent_back_out}},
    {"no-second-look",
     "a thread sends WANT without reading `mapped` again under the client's lock",
     Verdict::stuck,
     {.threads = 2, .fault = Fault::no_second_look}},

    // Faults of the link thread.
    {"no-wait",
     "the link thread does not wait until its own process has no holds",
     Verdict::bad_lease,
     {.fault = Fault::no_wait}},
    {"tells-first",
     "the link thread sends UNMAPPED before it unmaps",
     Verdict::bad_mapping,
     {.fault = Fault::tells_first}},
    {"counts-waiters-late",
     "MAP publishes `mapped` first, and a waiting thread adds its hold as it wakes",
     Verdict::bad_lease,
     {.fault = Fault::counts_waiters_late}},
    {"forgets-want",
     "the link thread does not repeat WANT after HELLO",
     Verdict::stuck,
     {.broker_crashes = true, .fault = Fault::forgets_want}},
    {"old-messages",
     "the link thread reads messages of the old connection after HELLO",
     Verdict::bad_lease,
     {.broker_crashes = true, .fault = Fault::old_messages}},
    {"answers-twice",
     "the link thread answers UNMAPPED to a REVOKE of a generation that it does not map",
     Verdict::bad_lease,
     {.broker_crashes = true, .fault = Fault::answers_twice}},

    // Faults of the broker.
    {"gone-late",
     "the broker writes `gone` to the books after it began to overwrite",
     Verdict::torn,
     {.broker_crashes = true, .fault = Fault::gone_late}},
    {"no-hello",
     "a new broker does not wait for the HELLO of a client in its books",
     Verdict::bad_lease,
     {.broker_crashes = true, .fault = Fault::no_hello}},
    {"trusts-books",
     "a new broker takes `draining` and `filling` for resident",
     Verdict::torn,
     {.broker_crashes = true, .fault = Fault::trusts_books}},
    {"reuses-at-hangup",
     "the broker reuses a granule when the connection has ended, not the process",
     Verdict::bad_lease,
     {.client_crashes = true, .fault = Fault::reuses_at_hangup}},
    {"notes-map-late",
     "the broker sends MAP, and notes in a later step that the client may map",
     Verdict::bad_lease,
     {.fault = Fault::notes_map_late}},
    {"maps-twice",
     "the broker sends MAP to a client whose UNMAPPED may be on its way",
     Verdict::bad_lease,
     {.fault = Fault::maps_twice}},
};

std::string text(const Step& step) {
  const std::string client = "client " + std::to_string(step.client + 1), what = step.what;
  switch (step.actor) {
    case Actor::thread: return client + ", thread " + std::to_string(step.thread + 1) + ": " + what;
    case Actor::link: return client + ", link thread: " + what;
    case Actor::process: return client + ": " + what;
    case Actor::broker: return "broker: " + what + (step.client < 0 ? "" : " " + client);
  }
  return what;
}

// Prints the verdict, and returns whether it is as expected.
bool judge(const Variant& variant) {
  const Finding finding = Search(variant.setup, variant.expected).run();
  const bool holds = finding.verdict == Verdict::holds;
  std::printf("%s %s: %s (%zu states)\n", holds ? "holds" : "broken", variant.name,
              variant.sentence, finding.states);
  for (const Step& step : finding.trace) std::printf("    %s\n", text(step).c_str());
  if (!holds) std::printf("  so %s\n", meaning(finding.verdict));
  const bool as_expected = finding.verdict == variant.expected;
  if (!as_expected) std::printf("  not as expected: %s\n", meaning(variant.expected));
  std::fflush(stdout);
  return as_expected;
}

}  // namespace

int main(int count, char** arguments) {
  const auto given = [&](std::string_view word) {
    return std::find(arguments + 1, arguments + count, word) != arguments + count;
  };
  const bool thorough = given("--thorough"), all = count == 1 || thorough;
  bool as_expected = true;
  for (const Variant& variant : kVariants)
    if (given(variant.name) || (all && (thorough || !variant.slow))) as_expected &= judge(variant);
  return as_expected ? 0 : 1;
}
