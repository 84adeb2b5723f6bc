// The softmax of one segment for up to sixteen vectors whose scores lie side by side: a register holds sixteen scores
// however few vectors there are. The arithmetic of each vector is the same for any number of them.
#pragma once

#include <array>
#include <limits>

#include "attend_amx.hpp"

namespace edgellm::EDGELLM_ISA {

// Of two registers, together [tokens][kVectors], the elements of kVectors / 2 vectors from `first` on.
template <int kVectors>
constexpr std::array<std::uint16_t, 32> half_the_vectors(int first) {
  constexpr int half = kVectors / 2;
  std::array<std::uint16_t, 32> order{};
  for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(i / half * kVectors + first + i % half);
  return order;
}

// 32 tokens of kVectors vectors in kVectors registers: from [tokens][vectors] to [vectors][tokens].
template <int kVectors>
inline void turn_tokens(__m512i* registers) {
  if constexpr (kVectors > 1) {
    constexpr int half = kVectors / 2;
    alignas(64) static constexpr auto front = half_the_vectors<kVectors>(0);
    alignas(64) static constexpr auto back = half_the_vectors<kVectors>(half);
    __m512i sorted[2 * half];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const __m512i a = registers[2 * i];
      const __m512i b = registers[2 * i + 1];
      sorted[i] = _mm512_permutex2var_epi16(a, _mm512_load_si512(front.data()), b);
      sorted[half + i] = _mm512_permutex2var_epi16(a, _mm512_load_si512(back.data()), b);
    }
    turn_tokens<half>(sorted);
    turn_tokens<half>(sorted + half);
    std::copy_n(sorted, kVectors, registers);
  }
}

// What N vectors see of a segment, where a register holds 16 / N tokens of each. Vectors past the walk's last one see
// what the last one does.
template <int N>
struct FewView {
  __m512i visible;  // per lane, tokens less the lane's own place among them
  int every, any;   // tokens that all vectors see, that one of them sees

  explicit FewView(const Segment& segment) {
    alignas(64) std::int32_t lanes[kLanes];
    const int last = segment.walk.vectors() - 1;
    const auto seen = [&](int v) { return std::clamp(segment.visible(std::min(v, last)), 0, segment.tokens()); };
    for (int i = 0; i < kLanes; ++i) lanes[i] = seen(i % N) - i / N;
    visible = _mm512_load_si512(lanes);
    every = seen(0);
    any = seen(last);
  }
  // The lanes that see their token, in the register that begins at `token`.
  __mmask16 sees(int token) const { return _mm512_cmpgt_epi32_mask(visible, _mm512_set1_epi32(token)); }
};

// What is the same in all lanes of a vector: op(a, b) of all its lanes.
template <int N, class Register, class Op>
inline Register across_tokens(Register lanes, const Op& op) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int step = N; step < kLanes; step *= 2) {
    const __m512i other = _mm512_xor_si512(lane, _mm512_set1_epi32(step));
    const __m512i moved = _mm512_permutexvar_epi32(other, reinterpret_cast<__m512i>(lanes));
    lanes = op(lanes, reinterpret_cast<Register>(moved));
  }
  return lanes;
}

template <int N>
class FewSoftmax {
 public:
  // scores [kSegmentTokens][N], weights [N][kSegmentTokens]; a score times its vector's lane of `units` is an exponent
  // of e. round(a, b, token): 16-bit weights of the registers that begin at `token` and after it.
  template <class Round>
  FewSoftmax(const FewView<N>& view, const float* scores, __m512 units, std::uint16_t* weights, const Round& round)
      : scores_(scores), weights_(weights), scale_(_mm512_mul_ps(units, _mm512_set1_ps(kLog2E))) {
    const __m512 largest = largest_score(view);
    _mm512_store_ps(largest_, _mm512_mul_ps(largest, units));
    shift_ = _mm512_mul_ps(largest, scale_);
    int t = 0;
    for (; t + 32 <= view.every; t += 32) soften(t, round, [](int) { return static_cast<__mmask16>(0xffff); });
    for (; t < view.any; t += 32) soften(t, round, [&](int token) { return view.sees(token); });
    for (int i = 0; i < kTotals; ++i) _mm512_store_ps(lanes_ + i * kLanes, totals_[i]);
  }

  float largest(int v) const { return largest_[v]; }
  float total(int v) const { return (lanes_[v] + lanes_[N + v]) + (lanes_[2 * N + v] + lanes_[3 * N + v]); }

 private:
  static constexpr int kTokens = kLanes / N;         // of a register
  static constexpr int kTotals = N < 4 ? 1 : N / 4;  // registers of [4][N]: every fourth token's weights

  __m512 load_scores(int token) const { return _mm512_loadu_ps(scores_ + token * N); }

  // In every lane, its vector's.
  __m512 largest_score(const FewView<N>& view) const {
    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    int t = 0;
    for (; t + kTokens <= view.every; t += kTokens) largest = _mm512_max_ps(largest, load_scores(t));
    for (; t < view.any; t += kTokens) largest = _mm512_mask_max_ps(largest, view.sees(t), largest, load_scores(t));
    return across_tokens<N>(largest, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
  }

  // 32 tokens' weights; mask(token) are the lanes that see theirs.
  template <class Round, class Mask>
  void soften(int first, const Round& round, const Mask& mask) {
    __m512i rounded[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      F32 weight[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int t = first + (2 * i + j) * kTokens;
        weight[j].v = exp2_masked(mask(t), _mm512_fmsub_ps(load_scores(t), scale_, shift_));
        add(weight[j].v, (2 * i + j) % kTotals);
      }
      rounded[i] = round(weight[0], weight[1], first + 2 * i * kTokens);
    }
    turn_tokens<N>(rounded);
    for (int v = 0; v < N; ++v) _mm512_storeu_si512(weights_ + v * kSegmentTokens + first, rounded[v]);
  }

  // Tokens in order, as where each has a register of its own.
  void add(__m512 weight, int total) {
    if constexpr (N >= 4) {
      totals_[total] = _mm512_add_ps(totals_[total], weight);
    } else {
      alignas(64) float lanes[kLanes];
      _mm512_store_ps(lanes, weight);
      for (int i = 0; i < kLanes; i += 4 * N) {
        totals_[0] = _mm512_add_ps(totals_[0], _mm512_maskz_loadu_ps((1U << 4 * N) - 1, lanes + i));
      }
    }
  }

  const float* scores_;
  std::uint16_t* weights_;
  __m512 scale_, shift_;
  __m512 totals_[kTotals] = {};
  alignas(64) float largest_[kLanes];
  alignas(64) float lanes_[kTotals * kLanes];  // of the totals
};

}  // namespace edgellm::EDGELLM_ISA
