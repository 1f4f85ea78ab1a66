// Who takes part in a run of tests/processes/lease_model.h, and which fault its protocol has.
#pragma once

// lease_protocol.cpp has a sentence on each.
enum class Fault {
  none,
  plain_add,
  fenced_add,
  plain_release,
  looks_first,
  silent_release,
  silent_back_out,
  no_second_look,
  no_wait,
  tells_first,
  counts_waiters_late,
  forgets_want,
  old_messages,
  answers_twice,
  gone_late,
  no_hello,
  trusts_books,
  reuses_at_hangup,
  notes_map_late,
  maps_twice,
};

struct Setup {
  int clients = 1, threads = 1;
  bool client_crashes = false, broker_crashes = false;
  Fault fault = Fault::none;
};
