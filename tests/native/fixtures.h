// Models with bytes that tell where they belong, and devices that are watched.
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

// A temporary file that holds layers one after the other. Each 8-byte word is made of the model's
// id, the layer and its index there, so no other place has the same.
class ModelFile {
 public:
  ModelFile(std::uint64_t id, const std::vector<std::uint64_t>& layer_bytes);
  ~ModelFile();
  ModelFile(const ModelFile&) = delete;

  const std::string& path() const { return path_; }
  File open() const;
  std::vector<LayerShape> shapes() const { return shapes_; }
  ModelPtr register_in(Runtime& runtime, bool writable = false) const;

  // Whether the model's addresses hold its bytes now, and zeros up to the end of the granules.
  bool is_in(Runtime& runtime, const ModelPtr& model) const;
  bool equals(std::size_t layer, const std::byte* bytes) const;  // of the layer's tensors alone
  bool begins(std::size_t layer, const std::byte* bytes, std::uint64_t count) const;

 private:
  std::string name_, path_;
  std::vector<LayerShape> shapes_;
  std::vector<std::vector<std::byte>> layers_;  // padded to granules
};

FileIdentity identity_of(int descriptor);

// Fences of a device that are reached only while it is open, however much time passes.
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

// A host device; or, where the program was given a simulator, a CUDA device, whatever the options.
std::shared_ptr<Driver> make_device(const HostOptions& options);

// A device under all wrappers: faults above, so that the checks see only what is let through.
struct Watched {
  explicit Watched(const HostOptions& options = {});
  std::shared_ptr<Gate> gate;
  std::shared_ptr<StrictDriver> strict;
  std::shared_ptr<FaultyDriver> driver;

  void expect_kept() const;      // no contract was broken
  void expect_returned() const;  // and nothing made on the device is left
};

// An arena of so many granules, filled in small chunks.
RuntimeOptions options(std::uint32_t granules, unsigned loaders = 2);

// Leases at once or fails; for the time of the scope.
class Leased {
 public:
  Leased(Runtime& runtime, const std::vector<Selection>& wants, std::uint64_t owner = 1);
  ~Leased() { runtime_.end_lease(hold_); }
  Leased(const Leased&) = delete;
  const HoldPtr& hold() const { return hold_; }

 private:
  Runtime& runtime_;
  HoldPtr hold_;
};

}  // namespace warmserve
