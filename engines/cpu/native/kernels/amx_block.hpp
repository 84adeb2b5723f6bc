// A segment of one KV head's half cache, converted to bf16 in the layouts that AMX multiplies.
#pragma once

#include <immintrin.h>

#include "attend_block.hpp"

namespace edgellm::EDGELLM_ISA {

using Bf16 = std::uint16_t;

// bf16 [32]: a's lanes, then b's.
inline __m512i to_bf16(F32 a, F32 b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)); }

// 16-bit values [2][16] to [16][2].
inline __m512i interleave(__m512i two) {
  alignas(64) static constexpr std::uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), two);
}

// A segment in scratch memory. Channels after head_dim are zero, and so are values of tokens after the last, up to a
// whole block; keys after it are anything.
struct SegmentStore {
  std::int64_t depth;  // head_dim, up to whole tiles
  Bf16* keys;          // [kSegmentTokens, depth]
  Bf16* values;        // [kSegmentTokens / 32][depth / 16]: tiles of [16 token pairs][16 channels][2]

  static constexpr std::int64_t floats(std::int64_t head_dim) { return kSegmentTokens * padded_head(head_dim); }
  SegmentStore(float* memory, std::int64_t head_dim)
      : depth(padded_head(head_dim)), keys(reinterpret_cast<Bf16*>(memory)), values(keys + kSegmentTokens * depth) {}
  Bf16* key(int token, std::int64_t d) const { return keys + token * depth + d; }
  // Of the pair that the even `token` begins.
  Bf16* value_pair(int token, std::int64_t d) const {
    return values + token / kBlockTokens * kBlockTokens * depth + d * kBlockTokens + token % kBlockTokens * 16;
  }
};

// One block's keys, or values, as they lie in the cache. kDepth: the head's channels where all tokens of the block
// exist and no channel needs padding, else 0.
template <int kDepth>
struct TokenRows {
  const std::uint16_t* data;
  std::int64_t stride;
  int tokens, head_dim;

  F32 lanes(int t, std::int64_t d) const {
    if constexpr (kDepth > 0) return load_f16(data + t * stride + d);
    return load_f16_n(data + t * stride + d, t < tokens ? head_dim - static_cast<int>(d) : 0);
  }
};

template <int kDepth>
void convert_keys(const TokenRows<kDepth>& rows, Bf16* out, std::int64_t padded, Ahead& ahead) {
  const std::int64_t depth = kDepth > 0 ? kDepth : padded;
  for (int t = 0; t < rows.tokens; ++t) {
#pragma GCC unroll 4
    for (std::int64_t d = 0; d < depth; d += 32) {
      ahead.line();
      _mm512_storeu_si512(out + t * depth + d, to_bf16(rows.lanes(t, d), rows.lanes(t, d + 16)));
    }
  }
}

template <int kDepth>
void convert_values(const TokenRows<kDepth>& rows, Bf16* out, std::int64_t padded, Ahead& ahead) {
  const std::int64_t depth = kDepth > 0 ? kDepth : padded;
  for (int t = 0; t < kBlockTokens; t += 2) {
#pragma GCC unroll 8
    for (std::int64_t d = 0; d < depth; d += 16) {
      ahead.line();
      const __m512i pair = to_bf16(rows.lanes(t, d), rows.lanes(t + 1, d));
      _mm512_storeu_si512(out + d * kBlockTokens + t * 16, interleave(pair));
    }
  }
}

// body(rows) with the keys, or the values, of the block that begins at token `first`.
template <class Body>
void with_rows(const Segment& segment, int first, bool is_values, const Body& body) {
  const int tokens = std::min(segment.tokens() - first, static_cast<int>(kBlockTokens));
  const Fp16Block block(segment.walk, segment.walk.block(segment.first + first), tokens);
  const std::uint16_t* data = is_values ? block.values : block.keys;
  const auto dim = static_cast<int>(segment.walk.head_dim());
  if (tokens == kBlockTokens && dim == 64) return body(TokenRows<64>{data, block.stride, tokens, dim});
  if (tokens == kBlockTokens && dim == 128) return body(TokenRows<128>{data, block.stride, tokens, dim});
  body(TokenRows<0>{data, block.stride, tokens, dim});
}

// The keys of the block at token `first`, as those of token `slot` of the store.
inline void load_keys(const Segment& segment, int first, int slot, const SegmentStore& out, Ahead& ahead) {
  with_rows(segment, first, false, [&](const auto& rows) { convert_keys(rows, out.key(slot, 0), out.depth, ahead); });
}

inline void load_values(const Segment& segment, int first, int slot, const SegmentStore& out, Ahead& ahead) {
  with_rows(segment, first, true,
            [&](const auto& rows) { convert_values(rows, out.value_pair(slot, 0), out.depth, ahead); });
}

}  // namespace edgellm::EDGELLM_ISA
