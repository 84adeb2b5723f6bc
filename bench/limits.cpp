// What this machine can do at best, measured beside every figure: bytes read from memory, and multiplications.
//
// Built by machine_limits.py for the machine it runs on. Each function runs on `threads` threads at once and returns
// what all of them did together.

#include <immintrin.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Seconds until `work(thread)` has ended on all threads.
template <class Work>
double run_on(int threads, Work work) {
  std::vector<std::thread> others;
  const auto start = Clock::now();
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (auto& other : others) other.join();
  return seconds_since(start);
}

// Keeps results from being optimised away, in registers.
template <class Value, std::size_t kCount>
void keep(const Value (&values)[kCount]) {
#pragma GCC unroll 16
  for (const auto& value : values) asm volatile("" : : "v"(value));
}

constexpr int kChains = 8;  // independent sums, so that latency is hidden
constexpr int64_t kRounds = 1 << 21;

#ifdef __AVX512F__
void read_lines(const char* from, const char* to) {
  __m512i sums[kChains] = {};
  for (; from + 64 * kChains <= to; from += 64 * kChains)
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain)
      sums[chain] = _mm512_or_si512(sums[chain], _mm512_load_si512(from + 64 * chain));
  keep(sums);
}

void multiply_fp32() {
  __m512 sums[2 * kChains] = {};
  __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
  for (int64_t round = 0; round < kRounds; ++round)
#pragma GCC unroll 16
    for (auto& sum : sums) {
      sum = _mm512_fmadd_ps(a, b, sum);
      asm volatile("" : "+v"(sum));
    }
  keep(sums);
}
constexpr double kFp32PerRound = 2 * kChains * 16 * 2;
#else
void read_lines(const char* from, const char* to) {
  __m256i sums[kChains] = {};
  for (; from + 32 * kChains <= to; from += 32 * kChains)
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain)
      sums[chain] = _mm256_or_si256(sums[chain], _mm256_load_si256(reinterpret_cast<const __m256i*>(from) + chain));
  keep(sums);
}

void multiply_fp32() {
  __m256 sums[kChains] = {};
  __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(0.5f);
  for (int64_t round = 0; round < kRounds; ++round)
#pragma GCC unroll 16
    for (auto& sum : sums) {
      sum = _mm256_fmadd_ps(a, b, sum);
      asm volatile("" : "+v"(sum));
    }
  keep(sums);
}
constexpr double kFp32PerRound = kChains * 8 * 2;
#endif

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void load_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  static const TileConfig config;
  _tile_loadconfig(&config);
}

void multiply_bf16() {
  load_tiles();
  for (int64_t round = 0; round < kRounds / 8; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
constexpr double kBf16PerRound = 4.0 / 8 * 16 * 16 * 32 * 2;

void multiply_int8() {
  load_tiles();
  for (int64_t round = 0; round < kRounds / 8; ++round) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}
constexpr double kInt8PerRound = 4.0 / 8 * 16 * 16 * 64 * 2;
#else
#ifdef __AVX512BF16__
void multiply_bf16() {
  __m512 sums[2 * kChains] = {};
  __m512bh a = {}, b = {};
  for (int64_t round = 0; round < kRounds; ++round)
#pragma GCC unroll 16
    for (auto& sum : sums) {
      sum = _mm512_dpbf16_ps(sum, a, b);
      asm volatile("" : "+v"(sum));
    }
  keep(sums);
}
constexpr double kBf16PerRound = 2 * kChains * 32 * 2;
#else
void multiply_bf16() {}
constexpr double kBf16PerRound = 0;
#endif

#ifdef __AVX512VNNI__
void multiply_int8() {
  __m512i sums[2 * kChains] = {};
  __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
  for (int64_t round = 0; round < kRounds; ++round)
#pragma GCC unroll 16
    for (auto& sum : sums) {
      sum = _mm512_dpbusd_epi32(sum, a, b);
      asm volatile("" : "+v"(sum));
    }
  keep(sums);
}
constexpr double kInt8PerRound = 2 * kChains * 64 * 2;
#else
void multiply_int8() {}
constexpr double kInt8PerRound = 0;
#endif
#endif

// Cores ask for more at once where they read in several pages: a third to a half more than from one place. Places a
// power of two apart were read a tenth slower, so their number is odd.
constexpr int kPlaces = 15;
constexpr int64_t kVisitBytes = 512;

void read_places(const char* data, int64_t bytes) {
  const int64_t part = bytes / kPlaces;
  for (int64_t at = 0; at < part; at += kVisitBytes)
    for (int place = 0; place < kPlaces; ++place)
      read_lines(data + place * part + at, data + place * part + at + kVisitBytes);
}

template <class Work>
double giga_operations_per_s(int threads, double per_round, Work work) {
  if (per_round == 0) return 0;
  const double seconds = run_on(threads, [&](int) { work(); });
  return threads * per_round * kRounds / seconds / 1e9;
}

}  // namespace

extern "C" {

// data [bytes], 64-byte aligned: each thread reads its own share once. GB/s.
double read_gb_per_s(const char* data, int64_t bytes, int threads) {
  const int64_t share = bytes / threads / (kPlaces * kVisitBytes) * (kPlaces * kVisitBytes);
  const double seconds = run_on(threads, [&](int thread) { read_places(data + thread * share, share); });
  return threads * share / seconds / 1e9;
}

// GFLOP/s or GOP/s, a multiplication and an addition counting as two; 0 where the machine has no such instruction.
double fp32_per_s(int threads) { return giga_operations_per_s(threads, kFp32PerRound, multiply_fp32); }
double bf16_per_s(int threads) { return giga_operations_per_s(threads, kBf16PerRound, multiply_bf16); }
double int8_per_s(int threads) { return giga_operations_per_s(threads, kInt8PerRound, multiply_int8); }
}
