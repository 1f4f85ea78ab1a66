// No driver call is made under the runtime's lock: while one thread waits in it, other threads can
// lease, query and cancel.
#include <future>
#include <thread>

#include "fixtures.h"

namespace warmserve {
namespace {

// Before each primitive, runs operations that need the lock on another thread. Excepted are the
// calls that CopyEngine makes under its own lock, for which a holder of the runtime's lock may
// wait.
class Probe final : public Interposer {
 public:
  using Interposer::Interposer;
  void watch(std::function<void()> operation) { operation_ = std::move(operation); }

 private:
  Status before(Primitive primitive) override {
    using enum Primitive;
    const bool in_copy_engine = primitive == stream_create || primitive == copy_to_device ||
                                primitive == fill_zero || primitive == event_create ||
                                primitive == event_record;
    if (in_copy_engine || !operation_) return Status::ok;
    auto done = std::async(std::launch::async, operation_);
    if (done.wait_for(std::chrono::seconds(10)) != std::future_status::ready)
      check::fail(__FILE__, __LINE__, std::string(to_string(primitive)) + " under the lock");
    return Status::ok;
  }
  std::function<void()> operation_;
};

void live_a_little(Runtime& runtime, const ModelPtr& a, const ModelPtr& b) {
  std::vector<std::byte> bytes(kGranule);
  for (int i = 0; i < 12; ++i) {  // more fences than are kept before completed ones are dropped
    const Leased leased(runtime, {a});
    const auto stream = std::make_shared<Stream>(runtime.device());
    stream->copy_from_device(bytes.data(), runtime.reservation(a)->address(), kGranule);
    runtime.record(leased.lease(), stream);
    stream->synchronize();
  }  // the user has dropped the stream
  runtime.wait(runtime.swap(a, b, kForeground), in(kLong), nullptr);
  runtime.read_back(b, 0, bytes.data());
  runtime.evict(b, in(kLong), nullptr);
  runtime.trim();
  const Leased leased(runtime, {a, b});
}

}  // namespace

TEST(other_threads_continue_while_one_waits) {
  for (const HostOptions& host : {HostOptions{}, HostOptions{.host_view = false},
                                  HostOptions{.threads = false, .host_view = false}}) {
    const auto probe = std::make_shared<Probe>(make_device(host));
    const auto runtime = Runtime::make(probe, options(4, host.threads ? 2 : 0));
    const ModelFile files[] = {{1, {kGranule, 9}}, {2, {kGranule, 9}}};
    const ModelPtr a = files[0].register_in(*runtime), b = files[1].register_in(*runtime);
    probe->watch([&] { runtime->leased(a); });
    live_a_little(*runtime, a, b);
    runtime->close(nullptr);
    probe->watch(nullptr);
  }
}

}  // namespace warmserve
