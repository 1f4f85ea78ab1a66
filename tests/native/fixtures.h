// Fixtures of native tests: models whose bytes are unique to their place, and devices whose use is
// checked.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "driver/checked/faulty.h"
#include "driver/checked/strict.h"
#include "runtime/runtime.h"

namespace warmserve {

constexpr std::uint64_t kGranule = 2 * kMiB;

inline Deadline in(std::chrono::milliseconds time) { return Clock::now() + time; }
inline const std::chrono::milliseconds kSoon{30}, kLong{60'000};

// A temporary file that contains layers one after the other. Each 8-byte word encodes the model's
// id, the layer and the word's index, so it is unique.
class ModelFile {
 public:
  ModelFile(std::uint64_t id, const std::vector<std::uint64_t>& layer_bytes);
  ~ModelFile();
  ModelFile(const ModelFile&) = delete;

  const std::string& path() const { return path_; }
  File open() const;
  std::vector<LayerShape> shapes() const { return shapes_; }
  ModelPtr register_in(Runtime& runtime, bool writable = false) const;

  // Returns whether the model's addresses contain its bytes, and zeros up to the end of the
  // granules.
  bool is_in(Runtime& runtime, const ModelPtr& model) const;
  bool equals(std::size_t layer, const std::byte* bytes) const;  // compares without the padding
  bool begins(std::size_t layer, const std::byte* bytes, std::uint64_t count) const;

 private:
  std::string name_, path_;
  std::vector<LayerShape> shapes_;
  std::vector<std::vector<std::byte>> layers_;  // padded to granules
};

FileIdentity identity_of(int descriptor);

// A wrapper of a device whose events complete only while the gate is open.
class Gate final : public Interposer {
 public:
  using Interposer::Interposer;
  void shut() { open_ = false; }
  void open() { open_ = true; }

  Status event_query(EventId event) override;
  Status event_wait(EventId event, std::chrono::microseconds timeout) override;

 private:
  std::atomic<bool> open_{true};
};

// Makes a host device; or a CUDA device, which ignores the options, if the program was started with
// a simulator.
std::shared_ptr<Driver> make_device(const HostOptions& options);

// A device under all wrappers. Faults are injected above the checks, which therefore see only the
// calls that reach the device.
struct Watched {
  explicit Watched(const HostOptions& options = {});
  std::shared_ptr<Gate> gate;
  std::shared_ptr<StrictDriver> strict;
  std::shared_ptr<FaultyDriver> driver;

  void expect_kept() const;      // fails if a contract was broken
  void expect_returned() const;  // fails also if an object of the device still exists
};

// Returns options for an arena of `granules` granules that is filled in small chunks.
RuntimeOptions options(std::uint32_t granules, unsigned loaders = 2);

// Holds a lease for its scope. Fails if the lease does not begin at once.
class Leased {
 public:
  Leased(Runtime& runtime, const std::vector<Selection>& wants, std::uint64_t owner = 1);
  ~Leased() { runtime_.end_lease(lease_); }
  Leased(const Leased&) = delete;
  const LeasePtr& lease() const { return lease_; }

 private:
  Runtime& runtime_;
  LeasePtr lease_;
};

}  // namespace warmserve
