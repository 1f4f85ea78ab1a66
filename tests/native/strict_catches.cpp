// StrictDriver reports each breach of a contract of driver.h, and reports no legal use.
#include <unistd.h>

#include <functional>

#include "base/lock_mark.h"
#include "fixtures.h"

namespace warmserve {
namespace {

constexpr std::uint64_t kPinned = 64 * kKiB;

// The objects that a legal copy needs: a mapped, writable granule, and pinned memory. There are no
// threads, so that a breach that is not caught does no harm before a wait.
struct Bench {
  explicit Bench(bool threads = false) : strict(make_host_driver({.threads = threads})) {
    CHECK(strict.granule_create(kGranule, &granule) == Status::ok);
    CHECK(strict.granule_create(kGranule, &spare) == Status::ok);
    CHECK(strict.address_reserve(4 * kGranule, &address) == Status::ok);
    CHECK(strict.map(address, &granule, 1) == Status::ok);
    CHECK(strict.set_access(address, kGranule, Access::read_write) == Status::ok);
    CHECK(strict.pinned_create(kPinned, &pinned) == Status::ok);
    for (StreamId* stream : {&a, &b})
      CHECK(strict.stream_create(StreamPriority::normal, stream) == Status::ok);
    CHECK(strict.event_create(&event) == Status::ok);
  }
  Status fill(StreamId stream) { return strict.copy_to_device(address, pinned, kPinned, stream); }
  Status read(StreamId stream) { return strict.copy_from_device(pinned, address, kPinned, stream); }
  // Digests the bytes that fill() writes, to the end of the pinned memory.
  Status digest(StreamId stream) {
    const auto out = reinterpret_cast<Address>(pinned + kPinned - 8);
    return strict.launch(DigestCall{address, kPinned, kGranule, out}, stream);
  }
  // Exports the spare granule and imports it.
  Handle import() {
    SharedGranule shared;
    lawful(strict.granule_export(spare, &shared));
    Handle imported{};
    lawful(strict.granule_import(shared, kGranule, &imported));
    ::close(shared.descriptor);
    return imported;
  }
  // Checks a legal step before the breach.
  void lawful(Status status) const { CHECK(status == Status::ok); }

  StrictDriver strict;
  Handle granule{}, spare{};
  SharedGranule shared;
  Address address = 0;
  std::byte* pinned = nullptr;
  StreamId a{}, b{};
  EventId event{};
};

struct Breach {
  const char* what;
  std::function<Status(Bench&)> commit;
};
constexpr Handle kNoGranule{12345678};
constexpr StreamId kNoStream{12345678};
constexpr EventId kNoEvent{12345678};

const Breach kBreaches[] = {
    {"a granule of half the granularity",
     [](Bench& x) { return x.strict.granule_create(kGranule / 2, &x.spare); }},
    {"a granule of nothing", [](Bench& x) { return x.strict.granule_create(0, &x.spare); }},
    {"release of an invalid granule",
     [](Bench& x) { return x.strict.granule_release(kNoGranule); }},
    {"release twice",
     [](Bench& x) {
       x.lawful(x.strict.granule_release(x.granule));
       return x.strict.granule_release(x.granule);
     }},
    {"release while a stream may write it",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.strict.granule_release(x.granule);
     }},
    {"export of an invalid granule",
     [](Bench& x) { return x.strict.granule_export(kNoGranule, &x.shared); }},
    {"export of a released granule",
     [](Bench& x) {
       x.lawful(x.strict.granule_release(x.granule));
       return x.strict.granule_export(x.granule, &x.shared);
     }},
    {"export of an imported granule",
     [](Bench& x) { return x.strict.granule_export(x.import(), &x.shared); }},
    {"import of half the granularity",
     [](Bench& x) { return x.strict.granule_import(x.shared, kGranule / 2, &x.spare); }},
    {"access to write an imported granule",
     [](Bench& x) {
       const Handle imported = x.import();
       x.lawful(x.strict.map(x.address + kGranule, &imported, 1));
       return x.strict.set_access(x.address + kGranule, kGranule, Access::read_write);
     }},
    {"a host write to an imported granule",
     [](Bench& x) {
       x.strict.host_wrote(x.import(), 0, kGranule);
       return Status::invalid;
     }},
    {"a reservation of half the granularity",
     [](Bench& x) { return x.strict.address_reserve(kGranule / 2, &x.address); }},
    {"freeing half a reservation",
     [](Bench& x) { return x.strict.address_free(x.address, 2 * kGranule); }},
    {"freeing what was never reserved",
     [](Bench& x) { return x.strict.address_free(x.address + kGranule, kGranule); }},
    {"freeing a reservation with a mapping",
     [](Bench& x) { return x.strict.address_free(x.address, 4 * kGranule); }},
    {"mapping an invalid granule",
     [](Bench& x) { return x.strict.map(x.address + kGranule, &kNoGranule, 1); }},
    {"mapping a released granule",
     [](Bench& x) {
       x.lawful(x.strict.granule_release(x.granule));  // it lives until it is unmapped
       return x.strict.map(x.address + kGranule, &x.granule, 1);
     }},
    {"mapping nothing", [](Bench& x) { return x.strict.map(x.address + kGranule, nullptr, 0); }},
    {"mapping over a mapping", [](Bench& x) { return x.strict.map(x.address, &x.spare, 1); }},
    {"mapping half over a mapping",
     [](Bench& x) { return x.strict.map(x.address + kGranule / 2, &x.spare, 1); }},
    {"mapping at an unaligned address",
     [](Bench& x) { return x.strict.map(x.address + kGranule + 4096, &x.spare, 1); }},
    {"mapping over the end of a reservation",
     [](Bench& x) {
       const Handle two[] = {x.spare, x.granule};
       return x.strict.map(x.address + 3 * kGranule, two, 2);
     }},
    {"mapping at an address that is not reserved",
     [](Bench& x) { return x.strict.map(x.address + 64 * kGranule, &x.spare, 1); }},
    {"unmapping half a mapping", [](Bench& x) { return x.strict.unmap(x.address, kGranule / 2); }},
    {"unmapping from the middle of a mapping",
     [](Bench& x) { return x.strict.unmap(x.address + kGranule / 2, kGranule / 2); }},
    {"unmapping a mapping and a hole",
     [](Bench& x) { return x.strict.unmap(x.address, 2 * kGranule); }},
    {"unmapping nothing", [](Bench& x) { return x.strict.unmap(x.address, 0); }},
    {"unmapping before a copy was waited for",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.strict.unmap(x.address, kGranule);
     }},
    {"unmapping after waiting for a stream that is not ordered after the copy",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       x.lawful(x.strict.event_record(x.event, x.b));
       x.lawful(x.strict.event_wait(x.event, std::chrono::seconds(60)));
       return x.strict.unmap(x.address, kGranule);
     }},
    {"unmapping after waiting for an earlier position of the stream",
     [](Bench& x) {
       x.lawful(x.strict.event_record(x.event, x.a));
       x.lawful(x.fill(x.a));
       x.lawful(x.strict.event_wait(x.event, std::chrono::seconds(60)));
       return x.strict.unmap(x.address, kGranule);
     }},
    {"access to half a mapping",
     [](Bench& x) {
       x.lawful(x.strict.map(x.address + kGranule, &x.spare, 1));
       return x.strict.set_access(x.address + kGranule, kGranule / 2, Access::read);
     }},
    {"access to an unmapped range",
     [](Bench& x) { return x.strict.set_access(x.address + kGranule, kGranule, Access::read); }},
    {"setting access a second time",
     [](Bench& x) { return x.strict.set_access(x.address, kGranule, Access::read); }},
    {"pinned memory that is not a multiple of 4 KiB",
     [](Bench& x) { return x.strict.pinned_create(5000, &x.pinned); }},
    {"unpinning half a region",
     [](Bench& x) { return x.strict.pinned_release(x.pinned, kPinned / 2); }},
    {"unpinning twice",
     [](Bench& x) {
       x.lawful(x.strict.pinned_release(x.pinned, kPinned));
       return x.strict.pinned_release(x.pinned, kPinned);
     }},
    {"unpinning memory that a copy may still read",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.strict.pinned_release(x.pinned, kPinned);
     }},
    {"destroying an invalid stream", [](Bench& x) { return x.strict.stream_destroy(kNoStream); }},
    {"synchronizing with an invalid stream",
     [](Bench& x) { return x.strict.stream_synchronize(kNoStream); }},
    {"destroying a stream with work",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.strict.stream_destroy(x.a);
     }},
    {"a wait of an invalid stream",
     [](Bench& x) { return x.strict.stream_wait_event(kNoStream, x.event); }},
    {"a wait of a stream for an invalid event",
     [](Bench& x) { return x.strict.stream_wait_event(x.a, kNoEvent); }},
    {"destroying an invalid event", [](Bench& x) { return x.strict.event_destroy(kNoEvent); }},
    {"recording an invalid event", [](Bench& x) { return x.strict.event_record(kNoEvent, x.a); }},
    {"recording on an invalid stream",
     [](Bench& x) { return x.strict.event_record(x.event, kNoStream); }},
    {"querying an invalid event", [](Bench& x) { return x.strict.event_query(kNoEvent); }},
    {"waiting for an invalid event",
     [](Bench& x) { return x.strict.event_wait(kNoEvent, std::chrono::seconds(0)); }},
    {"copying on an invalid stream", [](Bench& x) { return x.fill(kNoStream); }},
    {"copying to an unmapped address",
     [](Bench& x) { return x.strict.copy_to_device(x.address + kGranule, x.pinned, 4096, x.a); }},
    {"copying over the end of a mapping",
     [](Bench& x) {
       return x.strict.copy_to_device(x.address + kGranule - 4096, x.pinned, 8192, x.a);
     }},
    {"copying without access",
     [](Bench& x) {
       x.lawful(x.strict.map(x.address + kGranule, &x.spare, 1));
       return x.strict.copy_to_device(x.address + kGranule, x.pinned, 4096, x.a);
     }},
    {"copying to read-only memory",
     [](Bench& x) {
       x.lawful(x.strict.map(x.address + kGranule, &x.spare, 1));
       x.lawful(x.strict.set_access(x.address + kGranule, kGranule, Access::read));
       return x.strict.copy_to_device(x.address + kGranule, x.pinned, 4096, x.a);
     }},
    {"reading bytes that were not written since they were mapped",
     [](Bench& x) { return x.read(x.a); }},
    {"reading beside the written bytes",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.strict.copy_from_device(x.pinned, x.address + 4096, kPinned, x.a);
     }},
    {"reading before another stream's write",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.read(x.b);
     }},
    {"writing beside another stream's read",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       x.lawful(x.strict.stream_synchronize(x.a));
       x.lawful(x.read(x.a));
       return x.fill(x.b);
     }},
    {"writing beside another stream's write",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.fill(x.b);
     }},
    {"zeros beside another stream's write",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.strict.fill_zero(x.address, kPinned, x.b);
     }},
    {"zeros to an unmapped address",
     [](Bench& x) { return x.strict.fill_zero(x.address + kGranule - 4096, 8192, x.a); }},
    {"copying to a peer bytes that were never written",
     [](Bench& x) { return x.strict.copy_to_peer(x.address + kMiB, x.address, kPinned, x.a); }},
    {"unmapping memory that is still being copied to a peer",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       x.lawful(x.strict.stream_synchronize(x.a));
       x.lawful(x.strict.copy_to_peer(x.address + kMiB, x.address, kPinned, x.a));
       return x.strict.unmap(x.address, kGranule);
     }},
    {"a peer that has written to an unmapped address",
     [](Bench& x) {
       x.strict.peer_wrote(x.address + kGranule - 4096, 8192);
       return Status::invalid;
     }},
    {"a peer that has written to read-only memory",
     [](Bench& x) {
       x.lawful(x.strict.map(x.address + kGranule, &x.spare, 1));
       x.lawful(x.strict.set_access(x.address + kGranule, kGranule, Access::read));
       x.strict.peer_wrote(x.address + kGranule, 4096);
       return Status::invalid;
     }},
    {"a kernel reading bytes that were never written", [](Bench& x) { return x.digest(x.a); }},
    {"a kernel reading before another stream's write",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.digest(x.b);
     }},
    {"a kernel writing to read-only memory",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       x.lawful(x.strict.map(x.address + kGranule, &x.spare, 1));
       x.lawful(x.strict.set_access(x.address + kGranule, kGranule, Access::read));
       return x.strict.launch(GatherCall{x.address, x.address + kGranule, 1, 64, 64}, x.a);
     }},
    {"a kernel without granules to digest",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       return x.strict.launch(DigestCall{x.address, 64, 0, x.address}, x.a);
     }},
    {"unpinning memory that a kernel may still write",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       x.lawful(x.strict.stream_synchronize(x.a));
       x.lawful(x.digest(x.a));
       return x.strict.pinned_release(x.pinned, kPinned);
     }},
    {"the host writing memory that a stream may still read",
     [](Bench& x) {
       x.lawful(x.fill(x.a));
       x.strict.host_wrote(x.granule, 0, 4096);
       return Status::invalid;  // host_wrote() returns no status
     }},
    {"the host writing outside of a granule",
     [](Bench& x) {
       x.strict.host_wrote(x.granule, kGranule, 1);
       return Status::invalid;
     }},
    {"the host writing an invalid granule",
     [](Bench& x) {
       x.strict.host_wrote(kNoGranule, 0, 1);
       return Status::invalid;
     }},
    {"the host writing a released granule",
     [](Bench& x) {
       x.lawful(x.strict.granule_release(x.granule));
       x.strict.host_wrote(x.granule, 0, 4096);
       return Status::invalid;
     }},
};

}  // namespace

TEST(every_breach_is_caught) {
  std::string missed;
  for (const Breach& breach : kBreaches) {
    Bench bench;
    const Status status = breach.commit(bench);
    if (status != Status::invalid || bench.strict.violations().size() != 1)
      missed += std::string("\n  ") + breach.what;
  }
  if (!missed.empty()) check::fail(__FILE__, __LINE__, "not caught:" + missed);
}

TEST(a_stream_that_has_a_thread_is_not_stepped) {
  Bench bench(true);
  CHECK(bench.strict.stream_step(bench.a) == Status::invalid);
  CHECK(bench.strict.violations().size() == 1);
}

TEST(a_call_under_the_runtime_s_lock_is_caught) {
  Bench bench;
  LockMark::set();
  CHECK(bench.strict.event_query(bench.event) == Status::invalid);
  CHECK(bench.strict.stream_synchronize(bench.a) == Status::invalid);
  LockMark::clear();
  CHECK(bench.strict.violations().size() == 2);
  CHECK(bench.strict.event_query(bench.event) == Status::ok);
}

// Its bytes are as the other process left them, so they may be read, also after an unmap.
TEST(an_imported_granule_counts_as_filled) {
  Bench bench;
  const Handle imported = bench.import();
  for (int i = 0; i < 2; ++i) {
    const Address address = bench.address + kGranule;
    bench.lawful(bench.strict.map(address, &imported, 1));
    bench.lawful(bench.strict.set_access(address, kGranule, Access::read));
    bench.lawful(bench.strict.copy_from_device(bench.pinned, address, kPinned, bench.a));
    bench.lawful(bench.strict.stream_synchronize(bench.a));
    bench.lawful(bench.strict.unmap(address, kGranule));
  }
  bench.lawful(bench.strict.granule_release(imported));
  CHECK(bench.strict.violations().empty());
}

// After it the host is ordered behind all streams.
TEST(a_wait_for_the_device_is_a_wait_for_each_stream) {
  Bench bench;
  bench.lawful(bench.fill(bench.a));
  bench.lawful(bench.strict.device_synchronize());
  bench.lawful(bench.strict.unmap(bench.address, kGranule));
  CHECK(bench.strict.violations().empty());
}

// A copy that is refused in its second half does not count as a use of its first half.
TEST(a_refused_copy_changes_nothing) {
  Bench bench;
  CHECK(bench.strict.copy_to_device(bench.address + kGranule - 4096, bench.pinned, 8192, bench.a) ==
        Status::invalid);
  CHECK(bench.strict.unmap(bench.address, kGranule) == Status::ok);
  CHECK(bench.strict.violations().size() == 1);
}

TEST(lawful_use_is_let_through) {
  Bench bench(true);
  StrictDriver& strict = bench.strict;
  const auto ok = [&](Status status) { bench.lawful(status); };
  for (int i = 0; i < 3; ++i) {  // an event orders the two streams
    ok(bench.fill(bench.a));
    ok(strict.event_record(bench.event, bench.a));
    ok(strict.stream_wait_event(bench.b, bench.event));
    ok(bench.read(bench.b));
    ok(strict.event_record(bench.event, bench.b));
    ok(strict.stream_wait_event(bench.a, bench.event));
  }
  ok(strict.event_record(bench.event, bench.a));  // a is ordered after b
  ok(strict.event_wait(bench.event, std::chrono::seconds(60)));
  strict.host_wrote(bench.granule, 0, kGranule);
  ok(strict.copy_from_device(bench.pinned, bench.address + kMiB, kPinned, bench.a));
  ok(strict.copy_to_peer(bench.address + kPinned, bench.address, kPinned, bench.a));
  ok(strict.fill_zero(bench.address + kPinned, kPinned, bench.a));
  ok(strict.stream_synchronize(bench.a));
  strict.peer_wrote(bench.address + kPinned, kPinned);
  ok(strict.copy_from_device(bench.pinned, bench.address + kPinned, kPinned, bench.b));
  ok(strict.stream_synchronize(bench.b));
  ok(strict.map(bench.address + kGranule, &bench.spare, 1));
  ok(strict.map(bench.address + 2 * kGranule, &bench.granule, 1));  // at a second address
  ok(strict.set_access(bench.address + kGranule, 2 * kGranule, Access::read));
  ok(strict.unmap(bench.address, 3 * kGranule));
  ok(strict.address_free(bench.address, 4 * kGranule));
  ok(strict.pinned_release(bench.pinned, kPinned));
  for (const Handle handle : {bench.granule, bench.spare}) ok(strict.granule_release(handle));
  ok(strict.event_destroy(bench.event));
  for (const StreamId stream : {bench.a, bench.b}) ok(strict.stream_destroy(stream));
  CHECK(strict.violations().empty());
  for (const auto& [kind, count] : strict.live()) CHECK(count == 0);
}

}  // namespace warmserve
