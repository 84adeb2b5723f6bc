// Persistent worker threads that share chunks of one job with its caller.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace edgellm {

// One job at a time, from one caller at a time. The caller works too, and waits only for chunks that somebody has
// claimed: a worker that is asleep or was never scheduled costs nothing. Idle workers spin for some microseconds, then
// park in the kernel, because several engine processes may share the cores.
class ThreadPool {
 public:
  // `threads` counts the caller.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // body(thread, chunk) for every chunk in [0, chunks), each once, in any order; thread is in [0, threads()).
  template <class Body>
  void run(std::int64_t chunks, const Body& body) {
    if (chunks <= 1 || workers_.empty()) {
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) body(0, chunk);
      return;
    }
    const auto call = [](const void* context, int thread, std::int64_t chunk) {
      (*static_cast<const Body*>(context))(thread, chunk);
    };
    run_shared(static_cast<std::uint32_t>(chunks), call, &body);
  }

 private:
  using Call = void (*)(const void* context, int thread, std::int64_t chunk);

  void run_shared(std::uint32_t chunks, Call call, const void* context);
  void work(int thread);
  void claim_all(int thread);
  void wait_for_job(std::uint32_t seen) const;
  void wait_until_finished() const;

  // Generation in the high half, chunks not yet claimed in the low half. A claim is one compare-exchange: it succeeds
  // only while its generation's job is unfinished, so `call_` and `context_`, read before it, belong to that job.
  std::atomic<std::uint64_t> ticket_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<std::uint32_t> unfinished_{0};
  std::atomic<std::uint32_t> generation_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace edgellm
