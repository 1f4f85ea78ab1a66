// Makes a driver fail on purpose. What is failed never reaches the driver, so, as the contract
// says, it has changed nothing.
#pragma once

#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "driver/checked/interposer.h"

namespace warmserve {

class FaultyDriver final : public Interposer {
 public:
  // Calls are counted from 1 since arm(), all primitives together or one of them alone.
  struct Range {
    std::uint64_t first, last;
  };

  using Interposer::Interposer;

  // Fails the calls in these ranges. {{n, n}} is once, {{n, ~0}} from then on, {{n, n}, {m, m}}
  // again during the rollback. Without ranges calls are only counted.
  void arm(std::vector<Range> ranges, std::optional<Primitive> only, Status status);
  void disarm() { arm({}, std::nullopt, Status::failed); }
  std::uint64_t calls() const;     // since arm()
  std::uint64_t injected() const;  // since arm()
  std::string last() const;        // name of the last primitive that was failed

  // Each call of the primitive takes this much longer.
  void delay(Primitive primitive, std::chrono::microseconds by);
  // Granules beyond so many bytes are refused; ~0 lifts it.
  void cap_memory(std::uint64_t bytes);

  std::string detail() const override;
  Status granule_create(std::uint64_t bytes, Handle* out) override;
  Status granule_release(Handle handle) override;

 private:
  Status before(Primitive primitive) override;

  mutable std::mutex mutex_;  // guards all below; not held while a call is delayed or forwarded
  std::vector<Range> ranges_;
  std::optional<Primitive> only_;
  Status status_ = Status::failed;
  std::uint64_t calls_ = 0, injected_ = 0;
  std::optional<Primitive> last_;
  std::chrono::microseconds delays_[static_cast<int>(Primitive::count)]{};
  std::uint64_t cap_ = ~0ull, created_ = 0, granule_bytes_ = 0;
};

}  // namespace warmserve
