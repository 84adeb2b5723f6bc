// What attention on AMX tiles shares, whatever the cache holds: sixteen vectors side by side in lanes.
#pragma once

#include <algorithm>

#include "amx_tile.hpp"
#include "attend_walk.hpp"

namespace edgellm::EDGELLM_ISA {

inline constexpr int kTileVectors = 16;
inline constexpr float kLog2E = 1.44269504F;

// 2^x for x <= 0 or a little more: a minimax cubic of x's fraction, relative error 8e-5, well below the rounding to
// bf16 that follows. Lanes outside the mask are 0.
inline __m512 exp2_masked(__mmask16 mask, __m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.0780245215F);
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.226067156F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.695833564F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.999925196F));
  return _mm512_maskz_scalef_ps(mask, p, x);
}

// What sixteen vectors see of a segment.
struct View {
  __m512i visible;  // tokens, per vector
  int every, any;   // tokens that all of them see, that one of them sees

  View(const Segment& segment, int first) {
    alignas(64) std::int32_t lanes[kTileVectors];
    const int last = segment.walk.vectors() - 1;
    for (int i = 0; i < kTileVectors; ++i) {
      lanes[i] = std::clamp(segment.visible(std::min(first + i, last)), 0, segment.tokens());
    }
    visible = _mm512_load_si512(lanes);
    every = lanes[0];
    any = lanes[kTileVectors - 1];
  }
  __mmask16 sees(int token) const { return _mm512_cmpgt_epi32_mask(visible, _mm512_set1_epi32(token)); }
};

// Tiles 0 to 3 are sums.
inline void zero_four() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store_four(void* a, void* b, void* c, void* d, std::int64_t stride) {
  _tile_stored(0, a, stride);
  _tile_stored(1, b, stride);
  _tile_stored(2, c, stride);
  _tile_stored(3, d, stride);
}

}  // namespace edgellm::EDGELLM_ISA
