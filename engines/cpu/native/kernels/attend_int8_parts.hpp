// How attention over int8 KV cuts queries and weights into the 8-bit parts that tiles multiply.
#pragma once

#include "attend_amx.hpp"

namespace edgellm::EDGELLM_ISA {

inline constexpr std::int64_t kTileChannels = 64;
inline constexpr float kQuerySteps = 127.0F * kInt16Base;
inline constexpr float kWeightSteps = 255.0F * 256.0F;  // a weight may be a little more than 1

// high * base + low, of exact sums.
inline __m512 join_parts(__m512i high, __m512i low, float base) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(base), _mm512_cvtepi32_ps(low));
}

// A vector's steps: a query is `scale` times its whole numbers up to kQuerySteps.
struct QuerySteps {
  float scale = 0.0F, inverse = 0.0F;

  QuerySteps() = default;
  QuerySteps(const float* q, std::int64_t size) {
    F32 lanes = zero();
    for (std::int64_t d = 0; d < size; d += kLanes) lanes = max(lanes, abs(load_n(q + d, static_cast<int>(size - d))));
    const float largest = reduce_max(lanes);
    scale = largest / kQuerySteps;
    inverse = largest > 0.0F ? kQuerySteps / largest : 0.0F;
  }

  // The parts of up to 64 channels, `size` of which exist.
  void round(const float* q, int size, I32& high, I32& low) const {
    alignas(64) std::int8_t parts[2][kTileChannels] = {};
    for (int d = 0; d < kTileChannels && d < size; d += kLanes) {
      const __m512i steps = _mm512_cvtps_epi32(mul(load_n(q + d, size - d), set1(inverse)).v);
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(steps, _mm512_set1_epi32(kInt16Base / 2)), 7);
      const __m512i lower = _mm512_sub_epi32(steps, _mm512_slli_epi32(upper, 7));
      _mm_store_si128(reinterpret_cast<__m128i*>(parts[0] + d), _mm512_cvtepi32_epi8(upper));
      _mm_store_si128(reinterpret_cast<__m128i*>(parts[1] + d), _mm512_cvtepi32_epi8(lower));
    }
    high.v = _mm512_load_si512(parts[0]);
    low.v = _mm512_load_si512(parts[1]);
  }
};

// Turns 64 channels, of which register j has channels 4j to 4j + 3 of every 16, into their order.
inline void order_channels(__m512 (&channels)[4]) {
  const __m512 low01 = _mm512_shuffle_f32x4(channels[0], channels[1], 0x44);
  const __m512 high01 = _mm512_shuffle_f32x4(channels[0], channels[1], 0xee);
  const __m512 low23 = _mm512_shuffle_f32x4(channels[2], channels[3], 0x44);
  const __m512 high23 = _mm512_shuffle_f32x4(channels[2], channels[3], 0xee);
  channels[0] = _mm512_shuffle_f32x4(low01, low23, 0x88);
  channels[1] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
  channels[2] = _mm512_shuffle_f32x4(high01, high23, 0x88);
  channels[3] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
}

}  // namespace edgellm::EDGELLM_ISA
