// One head's keys and values of one block of the cache, for both stored types.
#pragma once

#include "../half.hpp"
#include "attend_walk.hpp"

namespace edgellm::EDGELLM_ISA {

template <class T>
struct HeadRows {
  using Value = T;
  const Value* keys;
  const Value* values;
  std::int64_t stride;  // elements from one token to the next

  HeadRows(const Walk& walk, const std::uint8_t* block)
      : keys(reinterpret_cast<const Value*>(block) + walk.kv_head * walk.head_dim()),
        values(keys + kBlockTokens * walk.args.kv.kv_heads * walk.head_dim()),
        stride(walk.args.kv.kv_heads * walk.head_dim()) {}
};

// Each type gives a token's values as lanes, and spreads the keys of 16 tokens, a 32-bit word of each token in a lane,
// over rows of [channels, 32] floats. `tokens` of the block exist.
struct Fp16Block : HeadRows<std::uint16_t> {
  Fp16Block(const Walk& walk, const std::uint8_t* block, int) : HeadRows(walk, block) {}

  F32 value_lanes(int t, std::int64_t d, int n) const { return load_f16_n(values + t * stride + d, n); }
  static void spread_keys(I32 words, int, float* out) {
    store(out, f16_low(words));
    store(out + kBlockTokens, f16_high(words));
  }
};

template <int Byte>
inline F32 signed_byte(I32 words) {
  return to_f32(shift_right_signed<24>(shift_left<24 - 8 * Byte>(words)));
}

struct Int8Block : HeadRows<std::int8_t> {
  float key_scales[kBlockTokens];  // zero where there is no token
  float value_scales[kBlockTokens];

  Int8Block(const Walk& walk, const std::uint8_t* block, int tokens) : HeadRows(walk, block) {
    const std::int64_t heads = walk.args.kv.kv_heads;
    const auto* scales = reinterpret_cast<const std::uint16_t*>(block + 2 * kBlockTokens * stride) + walk.kv_head;
    for (int t = 0; t < kBlockTokens; ++t) {
      key_scales[t] = t < tokens ? fp16_to_float(scales[t * heads]) : 0.0F;
      value_scales[t] = t < tokens ? fp16_to_float(scales[(kBlockTokens + t) * heads]) : 0.0F;
    }
  }

  F32 value_lanes(int t, std::int64_t d, int n) const {
    return mul(load_i8_n(values + t * stride + d, n), set1(value_scales[t]));
  }
  void spread_keys(I32 words, int t, float* out) const {
    const F32 scale = load(key_scales + t);
    store(out, mul(signed_byte<0>(words), scale));
    store(out + kBlockTokens, mul(signed_byte<1>(words), scale));
    store(out + 2 * kBlockTokens, mul(signed_byte<2>(words), scale));
    store(out + 3 * kBlockTokens, mul(signed_byte<3>(words), scale));
  }
};

}  // namespace edgellm::EDGELLM_ISA
