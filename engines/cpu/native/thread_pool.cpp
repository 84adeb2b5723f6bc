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

ThreadPool::ThreadPool(int threads) : shares_(threads) {
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
  for (int thread = 0; thread < threads(); ++thread) {
    const auto begin = static_cast<std::uint64_t>(share_begin(chunks, thread));
    const auto end = static_cast<std::uint64_t>(share_begin(chunks, thread + 1));
    shares_[thread].ticket.store(std::uint64_t{generation} << 32 | begin << 16 | end, std::memory_order_release);
  }
  generation_.store(generation, std::memory_order_release);
  generation_.notify_all();
  claim_all(0);
  wait_until_finished();
}

// Its own share first, then what is left of the others'.
void ThreadPool::claim_all(int thread) {
  std::uint32_t done = 0;
  while (const std::uint32_t chunks = claim_from(shares_[thread], thread, true)) done += chunks;
  finish(done);
  done = 0;
  for (int i = 1; i < threads(); ++i) {
    Share& share = shares_[(thread + i) % threads()];
    while (const std::uint32_t chunks = claim_from(share, thread, false)) done += chunks;
  }
  finish(done);
}

void ThreadPool::finish(std::uint32_t chunks) {
  if (chunks > 0 && unfinished_.fetch_sub(chunks, std::memory_order_acq_rel) == chunks) {
    unfinished_.notify_one();
  }
}

// Claims and runs half of what is left of a share: its owner from the front, others from the back. Returns the number
// of chunks.
std::uint32_t ThreadPool::claim_from(Share& share, int thread, bool is_own) {
  std::uint64_t ticket = share.ticket.load(std::memory_order_acquire);
  for (;;) {
    const std::uint64_t begin = ticket >> 16 & kMostChunks;
    const std::uint64_t end = ticket & kMostChunks;
    if (begin >= end) {
      return 0;
    }
    const std::uint64_t count = (end - begin + 1) / 2;
    const Call call = call_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    const std::uint64_t rest = is_own ? ticket + (count << 16) : ticket - count;
    if (share.ticket.compare_exchange_weak(ticket, rest, std::memory_order_acq_rel, std::memory_order_acquire)) {
      const auto first = static_cast<std::int64_t>(is_own ? begin : end - count);
      call(context, thread, first, first + static_cast<std::int64_t>(count));
      return static_cast<std::uint32_t>(count);
    }
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
