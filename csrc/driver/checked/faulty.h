// Makes a driver fail on purpose. A failed call never reaches the driver, so it changes nothing, as
// the contract requires.
#pragma once

#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "driver/checked/interposer.h"

namespace warmserve {

class FaultyDriver final : public Interposer {
 public:
  // A range of call numbers, counted from 1 since arm() over all primitives or over one of them.
  struct Range {
    std::uint64_t first, last;
  };

  using Interposer::Interposer;

  // Fails the calls in these ranges: {{n, n}} fails once, {{n, ~0}} from call n on, and
  // {{n, n}, {m, m}} again during the rollback. Without ranges, calls are only counted.
  void arm(std::vector<Range> ranges, std::optional<Primitive> only, Status status);
  void disarm() { arm({}, std::nullopt, Status::failed); }
  std::uint64_t calls() const;     // since arm()
  std::uint64_t injected() const;  // since arm()
  std::string last() const;        // name of the primitive that failed here last; empty if none

  // Makes each call of the primitive take longer by this time.
  void delay(Primitive primitive, std::chrono::microseconds by);
  // Refuses to create a granule that would raise the total above `bytes`; ~0 removes the limit.
  void cap_memory(std::uint64_t bytes);

  std::string detail() const override;
  Status granule_create(std::uint64_t bytes, Handle* out) override;
  Status granule_release(Handle handle) override;
  Status granule_import(const SharedGranule& shared, std::uint64_t bytes, Handle* out) override;

 private:
  Status before(Primitive primitive) override;

  mutable std::mutex mutex_;  // guards all below; released before a call is delayed or forwarded
  std::vector<Range> ranges_;
  std::optional<Primitive> only_;
  Status status_ = Status::failed;
  std::uint64_t calls_ = 0, injected_ = 0;
  std::optional<Primitive> last_;
  std::chrono::microseconds delays_[static_cast<int>(Primitive::count)]{};
  std::uint64_t cap_ = ~0ull, created_ = 0, granule_bytes_ = 0;
  std::set<Handle> imported_;  // granules that do not count as created
};

}  // namespace warmserve
