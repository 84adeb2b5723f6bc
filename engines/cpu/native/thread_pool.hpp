// Persistent worker threads that share the chunks of one job with its caller.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace edgellm {

// One job at a time, from one caller at a time. Each thread has a share of the chunks, neighbours in memory, and takes
// from others when its own is done. The caller works too, and waits only for chunks that somebody has claimed: a worker
// that is asleep or was never scheduled costs nothing. Idle workers spin for some microseconds, then park in the
// kernel, because several engine processes may share the cores.
class ThreadPool {
 public:
  static constexpr std::int64_t kMostChunks = 0xffff;  // of a job

  // `threads` counts the caller.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(shares_.size()); }

  // body(thread, begin, end) for ranges that hold every chunk of [0, chunks) once; thread is in [0, threads()), chunks
  // at most kMostChunks.
  template <class Body>
  void run(std::int64_t chunks, const Body& body) {
    if (chunks <= 1 || workers_.empty()) {
      if (chunks > 0) body(0, std::int64_t{0}, chunks);
      return;
    }
    const auto call = [](const void* context, int thread, std::int64_t begin, std::int64_t end) {
      (*static_cast<const Body*>(context))(thread, begin, end);
    };
    run_shared(static_cast<std::uint32_t>(chunks), call, &body);
  }

  // The first chunk of `thread`'s share of a job, and with threads() the last one's end. The caller's is the largest.
  std::int64_t share_begin(std::int64_t chunks, std::int64_t thread) const {
    return (chunks * thread + threads() - 1) / threads();
  }

 private:
  using Call = void (*)(const void* context, int thread, std::int64_t begin, std::int64_t end);

  // Generation in the high half, then the first chunk that is not yet claimed, and their end, 16 bits each. A claim is
  // one compare-exchange: it succeeds only while its generation's job is unfinished, so `call_` and `context_`, read
  // before it, belong to that job.
  struct alignas(64) Share {
    std::atomic<std::uint64_t> ticket{0};
  };

  void run_shared(std::uint32_t chunks, Call call, const void* context);
  void work(int thread);
  void claim_all(int thread);
  std::uint32_t claim_from(Share& share, int thread, bool is_own);
  void finish(std::uint32_t chunks);
  void wait_for_job(std::uint32_t seen) const;
  void wait_until_finished() const;

  std::vector<Share> shares_;  // per thread
  alignas(64) std::atomic<Call> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<std::uint32_t> generation_{0};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<std::uint32_t> unfinished_{0};
  std::vector<std::thread> workers_;
};

}  // namespace edgellm
