#include "fixtures.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace warmserve {

ModelFile::ModelFile(std::uint64_t id, const std::vector<std::uint64_t>& layer_bytes)
    : name_("model-" + std::to_string(id)) {
  const char* directory = std::getenv("TMPDIR");
  path_ = std::string(directory ? directory : "/tmp") + "/warmserve-XXXXXX";
  const int descriptor = ::mkstemp(path_.data());
  CHECK(descriptor >= 0);
  std::uint64_t offset = 0;
  for (std::uint64_t layer = 0; layer < layer_bytes.size(); ++layer) {
    const std::uint64_t bytes = layer_bytes[layer];
    std::vector<std::uint64_t> words(ceil_div(bytes, 8));
    for (std::uint64_t i = 0; i < words.size(); ++i) words[i] = id << 48 | layer << 40 | i;
    auto& padded = layers_.emplace_back(ceil_div(bytes, kGranule) * kGranule);
    if (bytes) std::memcpy(padded.data(), words.data(), bytes);
    CHECK(::write(descriptor, padded.data(), bytes) == static_cast<ssize_t>(bytes));
    // Two segments, so that chunks cross the border between segments.
    const std::uint64_t half = bytes / 2;
    shapes_.push_back({bytes, {{0, offset, 0, half}, {0, offset + half, half, bytes - half}}});
    offset += bytes;
  }
  ::close(descriptor);
}

ModelFile::~ModelFile() { ::unlink(path_.c_str()); }

FileIdentity identity_of(int descriptor) {
  struct stat status{};
  CHECK(::fstat(descriptor, &status) == 0);
  const auto nanoseconds = [](const timespec& t) {
    return static_cast<std::uint64_t>(t.tv_sec * 1'000'000'000 + t.tv_nsec);
  };
  return {status.st_dev, status.st_ino, static_cast<std::uint64_t>(status.st_size),
          nanoseconds(status.st_mtim), nanoseconds(status.st_ctim)};
}

File ModelFile::open() const {
  const int descriptor = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  CHECK(descriptor >= 0);
  return File(descriptor, path_, identity_of(descriptor));
}

ModelPtr ModelFile::register_in(Runtime& runtime, bool writable) const {
  std::vector<File> files;
  files.push_back(open());
  return runtime.register_model(name_, std::move(files), shapes_, writable);
}

bool ModelFile::equals(std::size_t layer, const std::byte* bytes) const {
  return begins(layer, bytes, shapes_[layer].bytes);
}

bool ModelFile::begins(std::size_t layer, const std::byte* bytes, std::uint64_t count) const {
  return std::memcmp(layers_[layer].data(), bytes, count) == 0;
}

bool ModelFile::is_in(Runtime& runtime, const ModelPtr& model) const {
  if (runtime.device()->facts().cuda_ordinal >= 0) {
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      std::vector<std::byte> bytes(shapes_[layer].bytes);
      runtime.read_back(model, static_cast<std::uint32_t>(layer), bytes.data());
      if (!equals(layer, bytes.data())) return false;
    }
    return true;
  }
  auto at = reinterpret_cast<const std::byte*>(runtime.reservation(model)->address());
  for (const auto& layer : layers_) {
    if (std::memcmp(layer.data(), at, layer.size()) != 0) return false;
    at += layer.size();
  }
  return true;
}

Status Gate::event_query(EventId event) {
  return open_ ? Interposer::event_query(event) : Status::not_ready;
}

Status Gate::event_wait(EventId event, std::chrono::microseconds timeout) {
  if (open_) return Interposer::event_wait(event, timeout);
  std::this_thread::sleep_for(timeout);
  return Status::not_ready;
}

std::shared_ptr<Driver> make_device(const HostOptions& options) {
  if (!check::simulator()) return make_host_driver(options);
  return make_cuda_driver({check::simulator(), 0, "simulated"});
}

namespace {

// Returns the simulator's report, which covers the time since the process began.
std::string simulator_report() {
  void* library = ::dlopen(check::simulator(), RTLD_NOW);
  CHECK(library);
  char* text = reinterpret_cast<char* (*)()>(::dlsym(library, "simcuda_report"))();
  const std::string report = text;
  reinterpret_cast<void (*)(char*)>(::dlsym(library, "simcuda_free"))(text);
  return report;
}

}  // namespace

Watched::Watched(const HostOptions& options)
    : gate(std::make_shared<Gate>(make_device(options))),
      strict(std::make_shared<StrictDriver>(gate)),
      driver(std::make_shared<FaultyDriver>(strict)) {}

void Watched::expect_kept() const {
  for (const std::string& violation : strict->violations())
    check::fail(__FILE__, __LINE__, "a contract was broken: " + violation);
  if (!check::simulator()) return;
  const std::string report = simulator_report();
  if (report.find("\"violations\": []") == std::string::npos)
    check::fail(__FILE__, __LINE__, "a rule of CUDA was broken: " + report);
}

void Watched::expect_returned() const {
  expect_kept();
  for (const auto& [kind, count] : strict->live())
    if (count) check::fail(__FILE__, __LINE__, std::to_string(count) + " " + kind + " still exist");
}

RuntimeOptions options(std::uint32_t granules, unsigned loaders) {
  RuntimeOptions options;
  options.arena_bytes = granules * kGranule;
  options.granule_bytes = kGranule;
  options.chunk_bytes = 512 * kKiB;
  options.staging_bytes = 4 * options.chunk_bytes;
  options.loaders = loaders;
  return options;
}

Leased::Leased(Runtime& runtime, const std::vector<Selection>& wants, std::uint64_t owner)
    : runtime_(runtime), lease_(runtime.begin_lease(wants, owner)) {
  runtime_.await_lease(lease_, in(kLong), nullptr);
}

}  // namespace warmserve
