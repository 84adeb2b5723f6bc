#include "thread_pool.hpp"

#include <chrono>

namespace edgellm {

namespace {

constexpr std::chrono::microseconds kSpin{20};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `ready()`, for kSpin at most.
template <class Ready>
bool spin(const Ready& ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) {
        return true;
      }
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  workers_.reserve(threads - 1);
  for (int thread = 1; thread < threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& worker : workers_) {
    worker.join();
  }
}

void ThreadPool::run_shared(std::uint32_t chunks, Call call, const void* context) {
  call_.store(call, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  unfinished_.store(chunks, std::memory_order_relaxed);
  const std::uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
  ticket_.store(static_cast<std::uint64_t>(generation) << 32 | chunks, std::memory_order_release);
  generation_.store(generation, std::memory_order_release);
  generation_.notify_all();
  claim_all(0);
  wait_until_finished();
}

void ThreadPool::claim_all(int thread) {
  std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (static_cast<std::uint32_t>(ticket) != 0) {
    const Call call = call_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      continue;
    }
    call(context, thread, static_cast<std::uint32_t>(ticket) - 1);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      unfinished_.notify_one();
    }
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void ThreadPool::work(int thread) {
  for (;;) {
    // In this order: the destructor raises the generation last, so one of the two is seen.
    const std::uint32_t seen = generation_.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_acquire)) {
      return;
    }
    claim_all(thread);
    wait_for_job(seen);
  }
}

void ThreadPool::wait_for_job(std::uint32_t seen) const {
  if (!spin([&] { return generation_.load(std::memory_order_relaxed) != seen; })) {
    generation_.wait(seen, std::memory_order_acquire);
  }
}

void ThreadPool::wait_until_finished() const {
  spin([&] { return unfinished_.load(std::memory_order_acquire) == 0; });
  for (std::uint32_t left = unfinished_.load(std::memory_order_acquire); left != 0;
       left = unfinished_.load(std::memory_order_acquire)) {
    unfinished_.wait(left, std::memory_order_acquire);
  }
}

}  // namespace edgellm
